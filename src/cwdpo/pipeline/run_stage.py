"""Runs one stage: prepare the data, set up the measurements, train."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from cwdpo.arguments import TrainSettings
from cwdpo.copies import fetch_written
from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import RecipeError
from cwdpo.models.adapter import idle_adapters_off
from cwdpo.monitor.instruments import instruments
from cwdpo.monitor.signals import Signals
from cwdpo.onpolicy.rounds import RoundData, Rounds
from cwdpo.pipeline.timings import StepTimes
from cwdpo.pipeline.windows import Windows
from cwdpo.rundir import RunDir
from cwdpo.stage.model import data_workers
from cwdpo.stage.prepare import prepare, with_reference_values
from cwdpo.stage.stage import Stage
from cwdpo.trainer.checkpoints import checkpoint_step, checkpoint_to_resume, readable
from cwdpo.trainer.guard import Guard
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions


class ListenerCallback(TrainerCallback):  # type: ignore[misc]
    """Reports every optimizer step to the listener."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step."""
        self.stage.listener.step(self.stage.name, state.global_step, state.max_steps)


def training_arguments(stage: Stage) -> TrainingArguments:
    """transformers' arguments for a stage, from the recipe."""
    recipe, settings = stage.recipe, stage.settings
    train, cpu = recipe.train, PartialState().device.type == "cpu"  # without a GPU `auto` is the CPU
    return TrainingArguments(
        output_dir=str(stage.run.path / stage.name),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        warmup_steps=train.warmup_steps,
        lr_scheduler_type=train.lr_scheduler_type,
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        save_strategy="no" if train.save_steps is None else "steps",
        save_steps=train.save_steps or 500,
        save_total_limit=train.save_total_limit,
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        bf16=train.bf16,
        report_to="none",  # the stage's trackers get what on_log gets
        seed=recipe.seed,
        use_cpu=cpu,
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
        **train.arguments,
    )


def check_arguments(train: TrainSettings) -> None:
    """Refuse values of ``train.arguments`` that transformers refuses, before anything is read.

    Raises:
        RecipeError: with transformers' reason, such as a package that an optimizer needs.
    """
    if not train.arguments:
        return
    try:
        args = TrainingArguments(output_dir="unused", report_to="none", **train.arguments)
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise RecipeError(f"train.arguments {dict(train.arguments)}: {said}") from error


def run_stage(stage: Stage) -> None:
    """Train ``stage.policy.model``, in place; if it was sharded, it is replaced by the joined model.

    Afterwards nothing of its trainer is in memory.

    Raises:
        DataError: too many examples cannot be used.
        NonFiniteError: the loss is not finite any more; nothing was updated.
    """
    _run(stage)
    # The trainer and what refers to it form circles, which Python would only free some time later: until then the
    # optimizer's state, with AdamW twice the size of the weights, would be kept beside the next stage's.
    stage.trainer = None
    gc.collect()


def _run(stage: Stage) -> None:
    with idle_adapters_off(stage.policy.model):
        parts, rows = _prepared(stage)
        with stage.autocast():
            signals = Signals.of(instruments(stage, rows), rows)
    stage.listener.phase(f"{stage.name}: {stage.settings.objective['name']}")
    stage.trainer = make_trainer(stage, rows if parts is None else parts.data, signals)
    if isinstance(parts, Rounds):
        stage.trainer.args.max_steps = parts.plan.steps  # an epoch is a round, so epochs do not set the steps
    if parts is not None:
        stage.trainer.add_callback(parts)
    checkpoint = checkpoint_to_resume(stage.run.path / stage.name) if stage.resume else None
    stage.run.drop_after(stage.name, checkpoint_step(checkpoint))
    if checkpoint is None:
        logged = stage.objective.logged()
        stage.trackers.parameters({f"{stage.name}.{name}": value for name, value in logged.items()})
    _train_from(stage, checkpoint, stage.trainer)


def _prepared(stage: Stage) -> tuple[Rounds | Windows | None, EncodedRows]:
    """Rounds or windows, if the stage runs in them, and its rows: to train on, or only for probes and curriculum."""
    if stage.recipe.data.streaming is not None and stage.stream is None:
        raise RecipeError("data.streaming: only cwdpo train reads window after window: set it to false")
    if not stage.in_rounds:
        rows = prepare(stage)
        all_read = stage.stream is None or stage.stream.ended
        return (None if all_read else Windows(stage, rows)), rows
    rounds = Rounds(stage)
    rows = rounds.dataset_rows
    if stage.recipe.probes.influence or stage.recipe.curriculum["name"] != "steady":
        rows = with_reference_values(stage, rows)  # the rounds' negatives are scored later
    return rounds, rows


def make_trainer(
    stage: Stage, data: Sequence[EncodedExample] | RoundData, signals: Signals | None = None
) -> PreferenceTrainer:
    """The trainer of a stage; it writes its metrics to the run folder."""
    train, run, signals = stage.recipe.train, stage.run, signals or Signals()
    times = StepTimes(stage)

    def on_log(row: Mapping[str, Any]) -> None:
        if "loss" in row:
            row = {**row, **stage.objective.logged(), **stage.in_force.known}
        # Sent first: a row that is sent twice after a kill does less harm than one that is missing.
        stage.trackers.numbers(stage.name, row["step"], row)
        store_row(run, {"stage": stage.name, **row})
        times.store(row["step"], trainer.state.max_steps)
        if "train_runtime" in row:
            times.end()

    more: dict[str, Any] = {}
    if signals.curriculum is not None:
        more["select"] = signals.curriculum.select

    def add_to_checkpoint(folder: Path) -> None:
        if signals.stopping is not None:
            signals.stopping.add_to_checkpoint(folder)
        fetch_written(folder)

    options = TrainerOptions(
        group_by_length=train.group_by_length,
        max_tokens_per_batch=train.max_tokens_per_batch,
        workers=data_workers(train),
        optimizer=train.optimizer,
        by_origin=stage.in_rounds,
        guard=Guard(run.path / stage.name, train.spike_factor, train.spike_window),
        on_log=on_log,
        before_checkpoint=run.sync,
        add_to_checkpoint=add_to_checkpoint,
        **more,
    )
    trainer = PreferenceTrainer(
        stage.policy.model,
        training_arguments(stage),
        stage.in_force,
        data,
        processing_class=stage.policy.processor,
        callbacks=[ListenerCallback(stage), *signals.callbacks],
        options=options,
    )
    trainer.remove_callback(PrinterCallback)  # the listener shows progress, metrics.jsonl has the numbers
    return trainer


def _train_from(stage: Stage, checkpoint: Path | None, trainer: PreferenceTrainer) -> None:
    """Train from a checkpoint or from the start; a checkpoint of the last step is only loaded."""
    if checkpoint is not None and checkpoint_step(checkpoint) >= total_steps(trainer):
        # transformers would take one more step before it checks the number of steps.
        trainer.load(checkpoint)
        if trainer.args.should_save:  # a kill after it was written may have left one more than the limit
            trainer.delete_old(checkpoint)
        return
    if checkpoint is not None:
        with readable(checkpoint, TRAINER_STATE_NAME):
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stage.policy.model = trainer.finished_model()


def total_steps(trainer: PreferenceTrainer) -> int:
    """Number of optimizer steps of the whole stage, as the Trainer counts them."""
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(steps)


def store_row(run: RunDir, row: Mapping[str, Any]) -> None:
    """Append a row of metrics; the Trainer's last row, the speed since the last start, goes to ``timings.jsonl``."""
    run.append("timings.jsonl" if "train_runtime" in row else "metrics.jsonl", [row])
