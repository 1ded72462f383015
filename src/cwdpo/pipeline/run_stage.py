"""One stage: encode, reference pass, calibration, train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from cwdpo.config import Recipe, StageSettings
from cwdpo.data.encode.encoder import EncodedExample, Encoder
from cwdpo.models.load import Policy, load_weights
from cwdpo.monitor.instruments import ProbeCallback, instruments
from cwdpo.monitor.signals import Signals
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.onpolicy.rounds import RoundData, Rounds
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.stage.prepare import (
    autocast,
    encode_usable,
    keep_negatives,
    reference_mean_logps,
    wants_calibration,
)
from cwdpo.stage.reference import stored_reference_pass
from cwdpo.trainer.guard import Guard
from cwdpo.trainer.trainer import PreferenceTrainer

StageName = Literal["stage1", "stage2"]


class ListenerCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the listener of every optimizer step."""

    def __init__(self, listener: Listener, stage: str) -> None:
        self.listener, self.stage = listener, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more step is done."""
        self.listener.step(self.stage, state.global_step, state.max_steps)


def training_arguments(recipe: Recipe, stage: StageSettings, folder: Path) -> TrainingArguments:
    """The recipe as transformers' arguments."""
    train = recipe.train
    cpu = recipe.model.device == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs,
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
        report_to=list(train.report_to) or "none",
        run_name=recipe.name,
        seed=recipe.seed,
        use_cpu=cpu,
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
    )


def with_reference_values(
    policy: Policy, encoded: Sequence[EncodedExample], objective: Objective, recipe: Recipe, run: RunDir
) -> list[EncodedExample]:
    """What the policy as it stands says of every completion, without the negatives that the objective filters."""
    bf16, size = recipe.train.bf16, recipe.train.batch_size
    with autocast(policy.model, bf16):
        shared = recipe.train.reference_cache
        scored = stored_reference_pass(
            policy.model, encoded, run, batch_size=size, bf16=bf16, folder=Path(shared) if shared else None
        )
    return keep_negatives(objective, scored)


def calibrated(
    objective: Objective,
    policy: Policy,
    encoder: Encoder,
    examples: Sequence[Example],
    recipe: Recipe,
    run: RunDir,
    stage: StageName,
) -> Objective:
    """Replace ``auto`` floor and tau, from samples of the policy as it stands (the reference).

    The values and the mean_logps that they came from are stored in the run and reused on resume.
    """
    if not wants_calibration(objective):
        return objective
    assert isinstance(objective, CwDpo)
    name = "calibration.json" if stage == "stage2" else f"calibration-{stage}.json"
    stored = run.json(name)
    if not stored:
        settings = recipe.calibration
        mean_logps = reference_mean_logps(
            policy.model, encoder, examples, settings.samples, settings.max_new_tokens, recipe.seed
        )
        found = objective.calibrated(mean_logps)
        stored = {"floor": found.floor, "tau": found.tau, "n": len(mean_logps), "mean_logps": mean_logps}
        run.write_json(name, stored)
    return objective.calibrated(stored["mean_logps"])


def run_stage(
    policy: Policy,
    encoder: Encoder,
    stage: StageName,
    recipe: Recipe,
    examples: Sequence[Example],
    validation: Sequence[Example],
    run: RunDir,
    listener: Listener | None = None,
    *,
    resume: bool = False,
) -> None:
    """Train ``policy.model``: in place, or where it was sharded, put together again.

    Args:
        examples: training examples with their negatives.
        validation: held-out examples for the probes.
        run: where metrics, readings and checkpoints go.
        resume: continue from the last checkpoint of this stage, if there is one.

    Raises:
        DataError: too many examples cannot be used.
        NonFiniteError: the loss is no longer finite; nothing was updated.
    """
    listener = listener or Listener()
    run.drop_stages("problems.jsonl", {stage})
    data: Sequence[EncodedExample] | RoundData
    rounds = None
    if stage == "stage2" and recipe.negatives.on_policy_fraction is not None:
        rounds = in_rounds(policy, encoder, recipe, examples, run, listener)
        data, objective = rounds.data, rounds.objective
        encoded = encoder.encode_all(examples, "rejected", require_negative=False)[0]
    else:
        data, objective = encoded, objective = made_once(
            policy, encoder, stage, recipe, examples, run, listener
        )
    with autocast(policy.model, recipe.train.bf16):
        found = instruments(
            policy, encoder, recipe, stage, objective, validation, examples, encoded, run, resume=resume
        )
    listener.phase(f"{stage}: {stage_settings(recipe, stage).objective['name']}")
    probes = None if found is None else ProbeCallback(found, run, stage, listener.measured, listener.readings)
    signals = Signals.of(probes, recipe, stage, objective, encoded, run, listener.phase)
    callbacks = [ListenerCallback(listener, stage), *signals.callbacks]
    trainer = make_trainer(
        policy, stage, recipe, objective, data, callbacks, run, by_origin=rounds is not None
    )
    signals.connect(trainer)
    if rounds is not None:
        rounds.steer(trainer)
    checkpoint = last_checkpoint(run.path / stage) if resume else None
    run.drop_after(stage, checkpoint_step(checkpoint))
    go_on(trainer, policy, checkpoint)


def stage_settings(recipe: Recipe, stage: StageName) -> StageSettings:
    """The recipe's section of a stage."""
    return recipe.stage1 if stage == "stage1" else recipe.stage2


def make_trainer(
    policy: Policy,
    stage: StageName,
    recipe: Recipe,
    objective: Objective,
    data: Sequence[EncodedExample] | RoundData,
    callbacks: Sequence[TrainerCallback],
    run: RunDir,
    *,
    by_origin: bool = False,
) -> PreferenceTrainer:
    """The recipe's trainer for one stage; its metrics go to the run."""
    train, settings = recipe.train, stage_settings(recipe, stage)
    trainer = PreferenceTrainer(
        policy.model,
        training_arguments(recipe, settings, run.path / stage),
        objective,
        data,
        processing_class=policy.processor,
        callbacks=callbacks,
        on_log=lambda row: store_row(run, with_cooling({"stage": stage, **row}, trainer.objective)),
        guard=Guard(run.path / stage, train.spike_factor, train.spike_window),
        by_origin=by_origin,
        group_by_length=train.group_by_length,
        max_tokens_per_batch=train.max_tokens_per_batch,
    )
    trainer.before_checkpoint = run.sync
    trainer.remove_callback(PrinterCallback)  # the listener shows progress, metrics.jsonl keeps the numbers
    return trainer


def made_once(
    policy: Policy,
    encoder: Encoder,
    stage: StageName,
    recipe: Recipe,
    examples: Sequence[Example],
    run: RunDir,
    listener: Listener,
) -> tuple[list[EncodedExample], Objective]:
    """Encoded examples with the negatives that they have, and the objective; nothing changes while it trains."""
    objective = stage_settings(recipe, stage).build()
    negatives: Literal["gentle", "rejected"] = "gentle" if stage == "stage1" else "rejected"
    encoded, problems = encode_usable(encoder, examples, objective, negatives, recipe.data.max_bad_fraction)
    run.append("problems.jsonl", ({"stage": stage, "problem": text} for text in problems))
    if objective.needs_reference:
        listener.phase(f"{stage}: reference pass over {len(encoded)} prompts")
        encoded = with_reference_values(policy, encoded, objective, recipe, run)
        kept = {e.id for e in encoded}
        with autocast(policy.model, recipe.train.bf16):
            prompts = [e for e in examples if e.id in kept]
            objective = calibrated(objective, policy, encoder, prompts, recipe, run, stage)
    return encoded, objective


def in_rounds(
    policy: Policy,
    encoder: Encoder,
    recipe: Recipe,
    examples: Sequence[Example],
    run: RunDir,
    listener: Listener,
) -> Rounds:
    """Stage 2 whose negatives are made anew before each round."""
    readable = encoder.readable(examples, len(examples))
    with autocast(policy.model, recipe.train.bf16):
        objective = calibrated(recipe.stage2.build(), policy, encoder, readable, recipe, run, "stage2")
    return Rounds(
        recipe, policy, encoder, examples, run, objective,
        lambda policy, encoded, objective: with_reference_values(policy, encoded, objective, recipe, run),
        listener.sampled,
    )  # fmt: skip


def go_on(trainer: PreferenceTrainer, policy: Policy, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start; a checkpoint of the last step is only loaded."""
    if checkpoint is not None and checkpoint_step(checkpoint) >= total_steps(trainer):
        # transformers would take one step more before it looks at the number of steps.
        load_weights(policy.model, checkpoint)
        return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    policy.model = trainer.whole_model()


def total_steps(trainer: PreferenceTrainer) -> int:
    """Optimizer steps of the whole stage."""
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(steps)


def store_row(run: RunDir, row: Mapping[str, Any]) -> None:
    """Metrics to their file; the Trainer's last row tells the speed of one start, not of the training."""
    run.append("timings.jsonl" if "train_runtime" in row else "metrics.jsonl", [row])


def with_cooling(row: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
    """The metrics row with floor and tau, where training rows carry weights."""
    if isinstance(objective, CwDpo) and "cooling/weight_mean" in row:
        fixed = objective.cooling == "constant"
        return {**row, **({} if fixed else {"cooling/floor": objective.floor, "cooling/tau": objective.tau})}
    return dict(row)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete ``checkpoint-N`` of a stage (its trainer state is written last)."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Step of a checkpoint; -1 for none."""
    if checkpoint is None:
        return -1
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
