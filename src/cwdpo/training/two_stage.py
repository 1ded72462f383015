"""The two-stage run: stage 1 smooths the policy, which then becomes the frozen reference of stage 2."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from cwdpo.config import Recipe, load_recipe
from cwdpo.data.encode import Encoder
from cwdpo.data.read import read_examples
from cwdpo.data.split import split_by_image
from cwdpo.errors import DataError
from cwdpo.models.load import Policy, load_policy, load_weights
from cwdpo.models.tiny import init_model
from cwdpo.negatives._mix import attach_negatives
from cwdpo.negatives._settings import WITHOUT_NEGATIVES
from cwdpo.records import Example
from cwdpo.report.model_card import write_model_card
from cwdpo.report.render import write_report
from cwdpo.rundir import RunDir, replace_folder, sync_tree
from cwdpo.training.evaluate import evaluate_policy
from cwdpo.training.prepare import autocast, check_scoring
from cwdpo.training.resume import start_run
from cwdpo.training.stage import Listener, run_stage


@dataclass(frozen=True)
class Splits:
    """Examples by use; no picture stands in two of them."""

    stage1: list[Example]
    stage2: list[Example]
    validation: list[Example]

    @property
    def texts(self) -> list[str]:
        """Every training text, for a tokenizer trained on the data."""
        train = (*self.stage1, *self.stage2)
        return [t for e in train for t in (e.prompt_text, e.chosen.text, *(r.text for r in e.rejected))]


def prepare_data(recipe: Recipe, run: RunDir) -> Splits:
    """Read, split by image, and attach negatives.

    An embedded world is first written to the run's own ``data/`` folder and then read like any other data.

    Raises:
        DataError: unreadable or empty data, or too many bad rows.
    """
    data = recipe.data
    path, validation_path = data.path, data.validation_path
    if data.world is not None:
        from cwdpo.worlds.shapes import materialise

        written = materialise(data.world, run.path / "data")
        path, validation_path = str(written["train"]), str(written["validation"])
    assert path is not None

    def read(source: str) -> list[Example]:
        result = read_examples(
            source,
            format=data.format,
            max_bad_fraction=data.max_bad_fraction,
            image_root=Path(data.image_root) if data.image_root else None,
            default_prompt=data.default_prompt,
            captions_per_image=data.captions_per_image,
            limit=data.limit,
        )
        if result.problems:
            rows = ({"stage": "read", "problem": str(p)} for p in result.problems)
            run.append("problems.jsonl", rows)
        return result.examples

    train = read(path)
    if validation_path is None:
        share = data.validation_fraction
        parts = split_by_image(train, {"train": 1 - share, "validation": share}, recipe.seed)
        train, validation = parts["train"], parts["validation"]
    else:
        validation = read(validation_path)
    stage1 = stage1_share(recipe)
    parts = split_by_image(train, {"stage1": stage1, "stage2": 1 - stage1}, recipe.seed)
    stage2 = parts["stage2"]
    if recipe.negatives.on_policy_fraction is None:  # else each round makes its own
        stage2 = with_negatives(stage2, recipe, run, need=recipe.stage2.build().needs_negatives)
    return Splits(
        with_negatives(parts["stage1"], recipe, run, need=False),
        stage2,
        with_negatives(validation, recipe, run, need=False),
    )


def stage1_share(recipe: Recipe) -> float:
    """Share of the training images for stage 1: all of them when the other stage is off."""
    if not recipe.stage2.enabled:
        return 1.0
    return recipe.data.stage1_fraction if recipe.stage1.enabled else 0.0


def with_negatives(examples: Sequence[Example], recipe: Recipe, run: RunDir, *, need: bool) -> list[Example]:
    """Attach negatives by the recipe's mix; where none is needed, examples without one are kept."""
    settings = recipe.negatives
    per_prompt = settings.per_prompt or (None if set(settings.mix) == {"dataset"} else 1)
    attached, _ = attach_negatives(
        examples,
        settings.mix,
        per_prompt,
        recipe.seed,
        gentle=settings.gentle,
        sources=settings.build_sources(),
    )
    if examples and not attached and need:
        raise DataError(f"no example of stage 2 has a negative: {WITHOUT_NEGATIVES}")
    missing = len(examples) - len(attached)
    if missing and need:
        text = f"{missing} of {len(examples)} examples for stage 2 have no negative and were left out"
        run.append("problems.jsonl", [{"stage": "negatives", "problem": text}])
    if need or not missing:
        return attached
    found = {e.id: e for e in attached}
    return [found.get(e.id, replace(e, rejected=())) for e in examples]


def load_model(recipe: Recipe, splits: Splits, run: RunDir) -> Policy:
    """The policy to train; ``path: init`` first makes a small LLaVA with a tokenizer of the data."""
    if recipe.model.path != "init":
        return load_policy(recipe.model)
    folder = run.path / "init"
    if not folder.exists():
        temporary = folder.with_name(".init.tmp")
        init_model(temporary, splits.texts, recipe.model.init)
        sync_tree(temporary)
        replace_folder(temporary, folder)
        # A process that finds the folder draws nothing to make it: a new adapter must start alike in both.
        set_seed(recipe.seed)
    return load_policy(recipe.model.model_copy(update={"path": str(folder)}))


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
        resume: continue the run in ``out`` from whatever is complete there.
        accept_changes: with ``resume``, go on with a recipe that differs from the run's.
        listener: hears phases and steps.

    Returns:
        The run folder, with the final model in ``model/`` and the report in ``report.html``.

    Raises:
        CwdpoError: bad recipe, data or model; a folder that already holds a run; a non-finite loss.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    listener = listener or Listener()
    state = PartialState(cpu=recipe.model.device == "cpu")
    run = RunDir(out or Path("runs") / recipe.name, writes=state.is_main_process)
    start_run(run, recipe, resume=resume, accept_changes=accept_changes)
    try:
        _train(recipe, run, state, listener, resume)
    finally:
        run.unlock()
    return run


def _train(recipe: Recipe, run: RunDir, state: PartialState, listener: Listener, resume: bool) -> None:
    listener.phase("reading data")
    with state.main_process_first():  # it writes the world and the small model that the others read
        splits = prepare_data(recipe, run)
        set_seed(recipe.seed)
        listener.phase("loading the model")
        policy = load_model(recipe, splits, run)
    encoder = Encoder(policy.processor, recipe.data.max_length, recipe.data.cache_gb)
    with autocast(policy.model, recipe.train.bf16):
        check_scoring(policy.model, encoder, [*splits.stage2, *splits.stage1], recipe.model.scoring)
    trained = resume and (run.path / "model").is_dir()
    if trained:
        load_weights(policy.model, run.path / "model")
    else:
        _run_stages(recipe, policy, encoder, splits, run, listener, resume)
    if run.writes:
        listener.phase("evaluation")
        with autocast(policy.model, recipe.train.bf16):
            summary = evaluate_policy(policy, encoder, splits.validation, recipe, run, resume=trained)
        run.write_json("summary.json", {"name": recipe.name, "seed": recipe.seed, **summary})
        write_model_card(run.path)
        write_report(run.path)
    state.wait_for_everyone()


def _run_stages(
    recipe: Recipe,
    policy: Policy,
    encoder: Encoder,
    splits: Splits,
    run: RunDir,
    listener: Listener,
    resume: bool,
) -> None:
    done = run.path / "stage1" / "model"
    held_out = splits.validation
    if recipe.stage1.enabled and resume and done.is_dir():
        load_weights(policy.model, done)
    elif recipe.stage1.enabled:
        run_stage(policy, encoder, "stage1", recipe, splits.stage1, held_out, run, listener, resume=resume)
        save_model(policy, done, run)
    if recipe.stage2.enabled:
        run_stage(policy, encoder, "stage2", recipe, splits.stage2, held_out, run, listener, resume=resume)
    save_model(policy, run.path / "model", run)


def save_model(policy: Policy, folder: Path, run: RunDir) -> None:
    """Write the model (or its adapter) and the processor; a half-written folder never has the final name."""
    if not run.writes:
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    policy.model.save_pretrained(temporary)  # type: ignore[operator]
    policy.processor.save_pretrained(temporary)
    sync_tree(temporary)
    replace_folder(temporary, folder)
