"""The data of a run: read, split by image, and with negatives attached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from cwdpo.config import Recipe
from cwdpo.data.mixture import Amount, in_turn, mixed
from cwdpo.data.problems import printable
from cwdpo.data.read.reader import read_examples
from cwdpo.data.split import SplitKeys
from cwdpo.data_settings import DataSettings
from cwdpo.errors import DataError
from cwdpo.files.stored import Stored, select
from cwdpo.negatives.image_side import with_image_negatives
from cwdpo.negatives.mix import Gentle, attach_negatives
from cwdpo.negatives.settings import WITHOUT_NEGATIVES
from cwdpo.objectives.base import Objective
from cwdpo.records import Example
from cwdpo.rundir import RunDir

if TYPE_CHECKING:
    from cwdpo.stage.stage import StageName
    from cwdpo.stage.streaming import StageStream


@dataclass(frozen=True)
class Splits:
    """The examples of each split; no image is in two splits. ``notes`` are lines for the user about the data.

    Of a recipe with ``data.streaming`` they are those of the first windows, and ``streams`` reads the others.
    """

    stage1: Sequence[Example]
    stage2: Sequence[Example]
    validation: Sequence[Example]
    notes: tuple[str, ...] = ()
    streams: Mapping[StageName, StageStream] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """All texts of the training splits, to train a tokenizer on."""
        train = chain(self.stage1, self.stage2)
        return [t for e in train for t in (e.prompt_text, e.chosen.text, *(r.text for r in e.rejected))]


def prepare_data(recipe: Recipe, run: RunDir) -> Splits:
    """Read the data, split it by image, and attach negatives.

    An embedded world is first written to the ``data/`` folder of the run and then read like any other data.

    Raises:
        DataError: the data cannot be read or is empty, or too many rows are bad.
    """
    if recipe.data.streaming is not None:
        from cwdpo.stage.streaming import streamed

        return streamed(recipe, run)
    data = _on_disk(recipe.data, run)
    notes: list[str] = []

    def read(source: str, how: DataSettings) -> Sequence[Example]:
        result = read_examples(source, **how.reading, max_bad_fraction=how.max_bad_fraction, limit=how.limit)
        if result.problems:
            rows = ({"stage": "read", "problem": printable(str(p))} for p in result.problems)
            run.append("problems.jsonl", rows)
        notes.extend(result.notes)
        return result.examples

    if data.path is not None:
        train = read(data.path, data)
    else:
        named = ((s.title, str(own.path), own) for s, own in zip(data.sources, data.each(), strict=True))
        # Two sources may have the same ids.
        train = Stored(
            replace(e, source=name, id=f"{name}/{e.id}") for name, path, own in named for e in read(path, own)
        )
    keys = SplitKeys.of(train)
    if data.validation_path is None:
        train, keys, validation = _held_out(train, keys, data.validation_fraction, recipe.seed)
    else:
        validation = read(data.validation_path, data)
    if not validation:
        notes.append(_without_validation(recipe))
    stage1 = stage1_share(recipe)
    index = keys.parts({"stage1": stage1, "stage2": 1 - stage1}, recipe.seed)
    parts = {name: select(train, places) for name, places in index.items()}
    if data.sources:
        amounts = {s.title: Amount(1.0 if s.repeat is None else s.repeat, s.weight) for s in data.sources}
        parts = {name: mixed(examples, amounts, recipe.seed) for name, examples in parts.items()}
        if not any(parts.values()):
            raise DataError(f"data.sources: repeat leaves no row of {len(train)} to train on: raise it")
        notes += [_mixture(name, amounts, examples) for name, examples in parts.items() if examples]
    if notes:
        run.append("notes.jsonl", ({"stage": "read", "note": note} for note in notes))
    stage2 = parts["stage2"]
    if recipe.negatives.on_policy_fraction is None:  # else each round makes its own
        objective = recipe.stage2.build()
        stage2 = with_negatives(stage2, recipe, run, need=objective.needs_negatives, gentle="none")
        check_margins(stage2, objective)
    return Splits(
        with_negatives(parts["stage1"], recipe, run, need=False, gentle=gentle_of_stage1(recipe)),
        stage2,
        with_negatives(in_turn(validation), recipe, run, need=False, first=recipe.probes.prompts),
        tuple(notes),
    )


def _held_out(
    examples: Sequence[Example], keys: SplitKeys, share: float, seed: int
) -> tuple[Sequence[Example], SplitKeys, Sequence[Example]]:
    """The rows to train on with their keys, and a share for validation."""
    index = keys.parts({"train": 1 - share, "validation": share}, seed)
    kept = index["train"]
    return select(examples, kept), keys.select(kept), select(examples, index["validation"])


def check_margins(examples: Sequence[Example], objective: Objective) -> None:
    """Check, before anything is trained, that every negative has what the objective of stage 2 needs.

    Raises:
        DataError: a negative has no reward margin, and the objective needs them.
    """
    problem = objective.without_margin()
    if problem is None:
        return
    for example in examples:
        if any(c.made.get("reward_margin") is None for c in example.rejected):
            raise DataError(f"{example.where or example.id}: {problem}")


def _on_disk(data: DataSettings, run: RunDir) -> DataSettings:
    """The settings; of an embedded world, the paths of the files that are written now."""
    if data.world is None:
        return data
    from cwdpo.worlds.shapes import materialise

    written = {name: str(path) for name, path in materialise(data.world, run.path / "data").items()}
    files = {"path": written["train"], "validation_path": written["validation"]}
    return data.model_copy(update={"world": None, **files})


def _mixture(stage: str, amounts: Mapping[str, Amount], examples: Sequence[Example]) -> str:
    """A line with what a stage trains on, of each source."""
    rows = Counter(e.source for e in examples)
    said = (f"{name} {rows[name]} ({rows[name] / len(examples):.0%})" for name in amounts)
    return f"{stage}: {len(examples)} rows of {len(amounts)} sources: {', '.join(said)}"


def _without_validation(recipe: Recipe) -> str:
    data = recipe.data
    return (
        f"{data.where}: data.validation_fraction = {data.validation_fraction:g} leaves no image for validation: there "
        "are no probes, no stop rules and no evaluation; set data.validation_path, or raise the fraction"
    )


def stage1_share(recipe: Recipe) -> float:
    """Share of the training images for stage 1; all of them if stage 2 is off."""
    if not recipe.stage2.enabled:
        return 1.0
    return recipe.data.stage1_fraction if recipe.stage1.enabled else 0.0


def gentle_of_stage1(recipe: Recipe) -> Gentle | None:
    """Where stage 1's gentle negatives come from, if not from the recipe's setting: plain SFT has no use for any."""
    return None if recipe.stage1.build().uses_negatives else "none"


def with_negatives(
    examples: Sequence[Example],
    recipe: Recipe,
    run: RunDir,
    *,
    need: bool,
    gentle: Gentle | None = None,
    first: int | None = None,
) -> Sequence[Example]:
    """Attach negatives with the recipe's mix; unless ``need``, examples without a negative are kept.

    ``gentle`` is used in place of the recipe's setting: stage 2 has no use for gentle negatives. Only the ``first`` so
    many get any: of held-out rows, those that the probes score.
    """
    settings = recipe.negatives
    per_prompt = settings.per_prompt or (None if set(settings.mix) == {"dataset"} else 1)
    attached, _ = attach_negatives(
        examples,
        settings.mix,
        per_prompt,
        recipe.seed,
        gentle=gentle or settings.gentle,
        sources=settings.build_sources(),
        first=first,
    )
    all_have_one = len(attached) == len(examples)
    if not all_have_one:
        attached = Stored(_with_the_others(examples, attached))
    every = with_image_negatives(attached, settings, recipe.seed, first=first)
    if not need or all_have_one:
        return every
    paired = select(every, [i for i, e in enumerate(every) if e.rejected])
    if examples and not paired:
        raise DataError(f"no example of stage 2 has a negative: {WITHOUT_NEGATIVES}")
    if len(paired) < len(examples):
        missing = len(examples) - len(paired)
        text = f"{missing} of {len(examples)} examples for stage 2 have no negative and were left out"
        run.append("problems.jsonl", [{"stage": "negatives", "problem": text}])
    return paired


def _with_the_others(examples: Iterable[Example], attached: Iterable[Example]) -> Iterator[Example]:
    """All examples in their order: as they are in ``attached``, or without a negative if they are not there."""
    found = iter(attached)
    next_ = next(found, None)
    for example in examples:
        if next_ is not None and next_.id == example.id:
            yield next_
            next_ = next(found, None)
        else:
            yield replace(example, rejected=())
