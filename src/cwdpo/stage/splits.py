"""The data of a run: read, split by image, and with negatives attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cwdpo.config import Recipe
from cwdpo.data.problems import printable
from cwdpo.data.read.reader import read_examples
from cwdpo.data.split import split_by_image
from cwdpo.errors import DataError
from cwdpo.negatives.image_side import with_image_negatives
from cwdpo.negatives.mix import attach_negatives
from cwdpo.negatives.settings import WITHOUT_NEGATIVES
from cwdpo.records import Example
from cwdpo.rundir import RunDir


@dataclass(frozen=True)
class Splits:
    """The examples of each split; no image is in two splits. ``notes`` are lines for the user about the data."""

    stage1: list[Example]
    stage2: list[Example]
    validation: list[Example]
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All texts of the training splits, to train a tokenizer on."""
        train = (*self.stage1, *self.stage2)
        return [t for e in train for t in (e.prompt_text, e.chosen.text, *(r.text for r in e.rejected))]


def prepare_data(recipe: Recipe, run: RunDir) -> Splits:
    """Read the data, split it by image, and attach negatives.

    An embedded world is first written to the ``data/`` folder of the run and then read like any other data.

    Raises:
        DataError: the data cannot be read or is empty, or too many rows are bad.
    """
    data = recipe.data
    path, validation_path = data.path, data.validation_path
    if data.world is not None:
        from cwdpo.worlds.shapes import materialise

        written = materialise(data.world, run.path / "data")
        path, validation_path = str(written["train"]), str(written["validation"])
    assert path is not None

    notes: list[str] = []

    def read(source: str) -> list[Example]:
        result = read_examples(
            source,
            format=data.format,
            max_bad_fraction=data.max_bad_fraction,
            image_root=Path(data.image_root) if data.image_root else None,
            default_prompt=data.default_prompt,
            captions_per_image=data.captions_per_image,
            limit=data.limit,
            ignore_columns=data.ignore_columns,
            video=data.video.sampling,
        )
        if result.problems:
            rows = ({"stage": "read", "problem": printable(str(p))} for p in result.problems)
            run.append("problems.jsonl", rows)
        notes.extend(result.notes)
        return result.examples

    train = read(path)
    if validation_path is None:
        share = data.validation_fraction
        parts = split_by_image(train, {"train": 1 - share, "validation": share}, recipe.seed)
        train, validation = parts["train"], parts["validation"]
    else:
        validation = read(validation_path)
    if not validation:
        notes.append(_without_validation(recipe))
    if notes:
        run.append("notes.jsonl", ({"stage": "read", "note": note} for note in notes))
    stage1 = stage1_share(recipe)
    parts = split_by_image(train, {"stage1": stage1, "stage2": 1 - stage1}, recipe.seed)
    stage2 = parts["stage2"]
    if recipe.negatives.on_policy_fraction is None:  # else each round makes its own
        stage2 = with_negatives(stage2, recipe, run, need=recipe.stage2.build().needs_negatives)
    return Splits(
        with_negatives(parts["stage1"], recipe, run, need=False),
        stage2,
        with_negatives(validation, recipe, run, need=False),
        tuple(notes),
    )


def _without_validation(recipe: Recipe) -> str:
    data = recipe.data
    return (
        f"{data.path}: data.validation_fraction = {data.validation_fraction:g} leaves no image for validation: there "
        "are no probes, no stop rules and no evaluation; set data.validation_path, or raise the fraction"
    )


def stage1_share(recipe: Recipe) -> float:
    """Share of the training images for stage 1; all of them if stage 2 is off."""
    if not recipe.stage2.enabled:
        return 1.0
    return recipe.data.stage1_fraction if recipe.stage1.enabled else 0.0


def with_negatives(examples: Sequence[Example], recipe: Recipe, run: RunDir, *, need: bool) -> list[Example]:
    """Attach negatives with the recipe's mix; unless ``need``, examples without a negative are kept."""
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
    if len(attached) < len(examples):
        found = {e.id: e for e in attached}
        attached = [found.get(e.id, replace(e, rejected=())) for e in examples]
    every = with_image_negatives(attached, settings, recipe.seed)
    if not need:
        return every
    paired = [e for e in every if e.rejected]
    if examples and not paired:
        raise DataError(f"no example of stage 2 has a negative: {WITHOUT_NEGATIVES}")
    if len(paired) < len(examples):
        missing = len(examples) - len(paired)
        text = f"{missing} of {len(examples)} examples for stage 2 have no negative and were left out"
        run.append("problems.jsonl", [{"stage": "negatives", "problem": text}])
    return paired
