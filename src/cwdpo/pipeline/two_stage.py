"""The two-stage run: the policy after stage 1 is the frozen reference of stage 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from cwdpo.arguments import check_trackers
from cwdpo.clock import Clock, running, spent_on
from cwdpo.config import Recipe, load_recipe
from cwdpo.copies import copied, send_copies
from cwdpo.files.checksums import refuse_damage
from cwdpo.models.adapter import with_adapter_settings
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.load_sharded import load_sharded
from cwdpo.models.packages import check_packages
from cwdpo.models.turns import silent_rows_from
from cwdpo.onpolicy.served import check_served_parts
from cwdpo.pipeline.finish import evaluate_policy, result_of
from cwdpo.pipeline.inputs import check_inputs
from cwdpo.pipeline.resume import start_run
from cwdpo.pipeline.run_stage import check_arguments, run_stage
from cwdpo.pipeline.timings import store_timings
from cwdpo.records import Example
from cwdpo.report.model_card import findings, write_model_card
from cwdpo.report.render import write_report
from cwdpo.rundir import RunDir
from cwdpo.stage.encoded import forget_rows
from cwdpo.stage.environment import check_environment
from cwdpo.stage.listener import Listener
from cwdpo.stage.model import (
    encoder_of,
    load_saved,
    model_settings,
    pictured_prompts,
    save_model,
    sharding_accelerator,
)
from cwdpo.stage.scoring_check import check_scoring, spread
from cwdpo.stage.splits import prepare_data
from cwdpo.stage.stage import Stage, StageName, autocast
from cwdpo.stage.trackers import Trackers, started_trackers
from cwdpo.waiting import first_alone, prepare, wait_for_all


def train_two_stage(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    listener: Listener | None = None,
) -> RunDir:
    """Run a recipe from data to report.

    Args:
        recipe: a recipe, or the path of one.
        out: run folder; default ``runs/<name>``.
        resume: continue the run in ``out`` from its last complete part.
        accept_changes: with ``resume``, allow a recipe that differs from the run's.
        listener: progress callbacks.

    Returns:
        The run folder, with the final model in ``model/`` and the report in ``report.html``.

    Raises:
        CwdpoError: recipe, data or model are bad; the folder already has a run; the loss is not finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_environment(recipe.train.bf16)
    check_packages(recipe.model)
    check_arguments(recipe.train)
    check_trackers(recipe.train.report_to)
    recipe = recipe.model_copy(update={"model": with_adapter_settings(recipe.model)})
    listener = listener or Listener()
    state = PartialState(cpu=recipe.model.device == "cpu")
    prepare()
    run = RunDir(out or Path("runs") / recipe.name, writes=state.is_main_process)
    start_run(run, recipe, resume=resume, accept_changes=accept_changes)
    try:
        with (
            running(Clock()),
            copied(run.path, listener.note),
            started_trackers(recipe, run, listener.note) as trackers,
        ):
            _train(recipe, run, listener, trackers, resume=resume, accept_changes=accept_changes)
    finally:
        run.unlock()
    return run


def _train(
    recipe: Recipe,
    run: RunDir,
    listener: Listener,
    trackers: Trackers,
    *,
    resume: bool,
    accept_changes: bool,
) -> None:
    listener.phase("reading data")
    # The main process writes the embedded world and the small model, which the others read; nothing was read before.
    with first_alone("reading data, loading the model", send_copies):
        with spent_on("data"):
            splits = prepare_data(recipe, run)
        for note in (*_notes(recipe), *splits.notes):
            listener.note(note)
        set_seed(recipe.seed)
        settings = model_settings(recipe, splits, run)
        accelerator = sharding_accelerator(recipe, listener.note)
        if accelerator is None:
            policy = _loaded(listener, partial(load_policy, settings))
    if accelerator is not None:
        policy = _loaded(listener, partial(load_sharded, settings, accelerator))
    if recipe.negatives.sampler.serve_adapter:
        check_served_parts(policy.model)
    check_inputs(run, splits, policy, resume=resume, accept_changes=accept_changes)
    encoder = encoder_of(policy, recipe)
    silent_rows_from(policy.model, lambda: pictured_prompts(encoder, splits))
    with autocast(policy.model, recipe.train.bf16):
        check_scoring(
            policy.model, encoder, [*spread(splits.stage2), *spread(splits.stage1)], recipe.model.scoring
        )

    def stage(name: StageName, examples: Sequence[Example]) -> Stage:
        return Stage(
            name, recipe, policy, encoder, run, examples, splits.validation, listener, trackers, resume,
            stream=splits.streams.get(name),
        )  # fmt: skip

    store_timings(run, "start")
    trained = resume and (run.path / "model").is_dir()
    if trained:
        if (first := run.path / "stage1" / "model").is_dir():
            refuse_damage(first, "remove it: this run is finished and does not need it")
        load_saved(policy, run.path / "model")
    else:
        _run_stages(stage("stage1", splits.stage1), stage("stage2", splits.stage2))
    listener.phase("evaluation")
    with spent_on("evaluation"), autocast(policy.model, recipe.train.bf16):
        summary = evaluate_policy(policy, encoder, splits.validation, recipe, run, resume=trained)
    if run.writes:
        run.write_json("summary.json", {"name": recipe.name, "seed": recipe.seed, **summary})
        store_timings(run, "end")
        with spent_on("report"):
            write_model_card(run.path)
            write_report(run.path)
        store_timings(run, "end")  # the report cannot show its own time
        if trackers:
            trackers.result(result_of(run, findings(run.path)))
    wait_for_all("evaluation and report")


def _loaded(listener: Listener, load: Callable[[], Policy]) -> Policy:
    listener.phase("loading the model")
    with spent_on("loading the model"):
        return load()


def _notes(recipe: Recipe) -> list[str]:
    """Warnings about settings that are allowed but rarely intended."""
    model, notes = recipe.model, []
    if model.tune == "full" and model.dtype in ("bfloat16", "float16"):
        bits = 8 if model.dtype == "bfloat16" else 11
        notes.append(
            f"model.dtype = {model.dtype} with full fine-tuning: an update below 1/{2**bits} of a weight is lost by "
            "rounding, and at fine-tuning learning rates most updates are that small; dtype: auto trains float32 "
            "weights, and train.bf16 still computes in bfloat16"
        )
    return notes


def _run_stages(first: Stage, second: Stage) -> None:
    """Train both stages, one after the other, on the same policy; after stage 1 it is the reference of stage 2."""
    run, policy = first.run, first.policy
    smoothed = run.path / "stage1" / "model"
    if first.settings.enabled and first.resume and smoothed.is_dir():
        load_saved(policy, smoothed)
    elif first.settings.enabled:
        run_stage(first)
        forget_rows(first)
        save_model(policy, smoothed, run)
    if second.settings.enabled:
        run_stage(second)
        forget_rows(second)
    save_model(policy, run.path / "model", run)
