"""The data of a run that is streamed (``data.streaming``): each stage reads the source by itself, window by window.

Which rows a stage gets is decided row by row, from the images of the row and of the held-out rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from cwdpo.config import Recipe
from cwdpo.data.mixture import divided, in_turn
from cwdpo.data.problems import Problem, explain_problems, printable
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import open_source
from cwdpo.data.read.stream import Place, RowStream, Window
from cwdpo.data.split import content_keys, part_of
from cwdpo.errors import DataError, RecipeError
from cwdpo.files.stored import Stored
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import Splits, gentle_of_stage1, stage1_share, with_negatives
from cwdpo.stage.stage import StageName
from cwdpo.waiting import processes

FILE = "windows.jsonl"
"""What the windows of a run are, a line for each."""
_HELD_OUT = "has an image that is held out"
_MIXED = "has images of both stages"
_ALONE = "has no negative"


@dataclass(frozen=True)
class StageWindow:
    """A window of a stage: its examples, and what was read of each source for it."""

    parts: tuple[Window, ...]
    examples: Sequence[Example]

    @property
    def rows(self) -> int:
        """Rows that were read for it."""
        return sum(part.rows for part in self.parts)

    @property
    def bad_rows(self) -> int:
        """Those of them with a problem."""
        return sum(part.bad_rows for part in self.parts)

    @property
    def problems(self) -> list[Problem]:
        """Of these rows."""
        return [problem for part in self.parts for problem in part.problems]

    @property
    def span(self) -> str:
        """Which rows of which sources it is made of."""
        spans = ((p, p.end.row if p.end.turn == p.begin.turn else "the last one") for p in self.parts)
        return ", ".join(f"{part.name}: rows {part.begin.row + 1} to {last}" for part, last in spans)


def _sizes(recipe: Recipe, whole: int) -> list[int]:
    """A number of examples, divided among the sources by their weights."""
    sources = recipe.data.sources
    if not sources:
        return [whole]
    found = divided(whole, {source.title: source.weight or 0.0 for source in sources})
    if 0 in found.values():
        raise RecipeError(
            f"data.sources: of {whole} rows {min(found, key=found.__getitem__)!r} would have none: raise its weight, "
            "or data.streaming"
        )
    return list(found.values())


def _joined(parts: Sequence[Window], titles: Sequence[str]) -> Sequence[Example]:
    """The examples of all sources, named by them; of a single one as they are."""
    if not titles:
        return parts[0].examples
    # Two sources may have the same ids.
    return Stored(
        replace(e, source=title, id=f"{title}/{e.id}")
        for part, title in zip(parts, titles, strict=True)
        for e in part.examples
    )


class StageStream:
    """The windows of a stage.

    Args:
        recipe: the recipe of the run, with ``data.streaming``.
        run: the run folder, for problems.
        name: the stage.
        held_out: :func:`cwdpo.data.split.content_keys` of the held-out rows, which are not trained on.

    Raises:
        RecipeError: a window has fewer rows than an optimizer step, or none of a source.

    Attributes:
        size: examples of a window: ``data.streaming.window``, rounded down to whole optimizer steps.
        sources: reads each source.
        first: the first window, without negatives; its examples with negatives are the stage's.
    """

    def __init__(self, recipe: Recipe, run: RunDir, name: StageName, held_out: Set[bytes]) -> None:
        data = recipe.data
        assert data.streaming is not None
        self._recipe, self._run, self.name, self._held_out = recipe, run, name, held_out
        self._share = stage1_share(recipe)
        stage = recipe.stage1 if name == "stage1" else recipe.stage2
        of_data = set(recipe.negatives.mix) == {"dataset"} and not recipe.negatives.image_mix
        self._needs_own = name == "stage2" and of_data and stage.build().needs_negatives
        self._left_out: Counter[str] = Counter()
        step = recipe.train.batch_size * recipe.train.gradient_accumulation_steps * processes()
        self.size = data.streaming.window // step * step
        if not self.size:
            raise RecipeError(
                f"data.streaming.window = {data.streaming.window}: a window has whole optimizer steps, and one takes "
                f"{step} rows: set it to {step} or more"
            )
        self._titles = [source.title for source in data.sources]
        self._sizes = _sizes(recipe, self.size)
        self.sources = [
            RowStream(open_source(str(own.path), streaming=True), self._takes, **own.reading)
            for own in data.each()
        ]
        self.first = self.read([Place()] * len(self.sources), once=not data.sources)

    @property
    def ended(self) -> bool:
        """Whether the first window has all rows there are; of a mixture no source ends."""
        return not self._titles and self.first.parts[0].ended

    def _takes(self, example: Example) -> bool:
        reason = self._objection(example)
        if reason:
            self._left_out[reason] += 1
        return reason == ""

    def _objection(self, example: Example) -> str | None:
        """Why an example is left out; "" if it is not, ``None`` if it belongs to the other stage."""
        keys = content_keys(example)
        if not self._held_out.isdisjoint(keys):
            return _HELD_OUT
        first = part_of(keys, self._share, self._recipe.seed)
        if first is None:
            return _MIXED
        if first != (self.name == "stage1"):
            return None
        return _ALONE if self._needs_own and not example.rejected else ""

    def read(
        self,
        begin: Sequence[Place],
        *,
        once: bool = False,
        known: Sequence[Mapping[int, str]] = (),
        before: tuple[int, int] = (0, 0),
    ) -> StageWindow:
        """A window.

        Args:
            begin: where it begins in each source.
            once: see :meth:`cwdpo.data.read.stream.RowStream.window`.
            known: the same, for each source.
            before: rows and bad rows of earlier windows.

        Raises:
            DataError: more than ``data.max_bad_fraction`` of all rows so far are bad; or see there.
        """
        parts = tuple(
            source.window(place, size, once=once, known=own)
            for source, place, size, own in zip(
                self.sources, begin, self._sizes, known or [{}] * len(begin), strict=True
            )
        )
        window = StageWindow(parts, _joined(parts, self._titles))
        most, rows, bad = (
            self._recipe.data.max_bad_fraction,
            before[0] + window.rows,
            before[1] + window.bad_rows,
        )
        if bad > most * rows:
            raise DataError(
                f"{self._recipe.data.where}: {bad} of {rows} rows so far are bad, more than data.max_bad_fraction = "
                f"{most:g} allows; of this window:\n{explain_problems(window.problems)}\n"
                "Fix these rows, or raise data.max_bad_fraction to continue without them."
            )
        return window

    def with_negatives(self, window: StageWindow) -> Sequence[Example]:
        """The examples of a window with the negatives of the recipe's mix, drawn among the window's examples."""
        if self.name == "stage1":
            gentle = gentle_of_stage1(self._recipe)
            return with_negatives(window.examples, self._recipe, self._run, need=False, gentle=gentle)
        needed = self._recipe.stage2.build().needs_negatives
        return with_negatives(window.examples, self._recipe, self._run, need=needed, gentle="none")

    def notes(self) -> list[str]:
        """What was left out of the rows that were read so far."""
        rows = self.first.rows
        return [
            f"{self.name}: of the first {rows} rows, {n} left out: {why}" for why, n in self._left_out.items()
        ]


def streamed(recipe: Recipe, run: RunDir) -> Splits:
    """Held-out rows, and the first window of each stage, of a recipe with ``data.streaming``.

    Raises:
        DataError: the data cannot be read one row after another, or there is no row for a stage.
    """
    data = recipe.data
    assert data.streaming is not None
    notes: list[str] = []
    problems: list[Problem] = []
    validation: Sequence[Example]
    held_out: frozenset[bytes] = frozenset()
    if data.validation_path is None:
        validation = in_turn(_held_out(recipe))
        held_out = frozenset(key for example in validation for key in content_keys(example))
        notes.append(f"{data.where}: the first {len(validation)} examples are held out")
    else:
        found = read_examples(data.validation_path, **data.reading, max_bad_fraction=data.max_bad_fraction)
        validation, notes = found.examples, list(found.notes)
        problems += found.problems
    names: tuple[StageName, ...] = ("stage1", "stage2")
    streams = {n: StageStream(recipe, run, n, held_out) for n in names if getattr(recipe, n).enabled}
    parts: dict[str, Sequence[Example]] = {}
    for name, stream in streams.items():
        parts[name] = stream.with_negatives(stream.first)
        notes += [*(note for part in stream.first.parts for note in part.notes), *stream.notes()]
        problems += stream.first.problems
    notes = list(dict.fromkeys(notes))
    if problems:
        said = dict.fromkeys(printable(str(problem)) for problem in problems)
        run.append("problems.jsonl", ({"stage": "read", "problem": text} for text in said))
    if notes:
        run.append("notes.jsonl", ({"stage": "read", "note": note} for note in notes))
    return Splits(
        parts.get("stage1", []),
        parts.get("stage2", []),
        with_negatives(validation, recipe, run, need=False, first=recipe.probes.prompts),
        tuple(notes),
        streams,
    )


def _held_out(recipe: Recipe) -> Sequence[Example]:
    """The first examples of each source.

    Raises:
        DataError: a source has no more than these.
    """
    data = recipe.data
    assert data.streaming is not None
    windows = []
    for own, size in zip(data.each(), _sizes(recipe, data.streaming.validation), strict=True):
        rows = RowStream(open_source(str(own.path), streaming=True), **own.reading)
        windows.append(rows.window(Place(), size, once=True))
        if windows[-1].ended:
            raise DataError(
                f"{own.path}: has {windows[-1].rows} rows, and {size} are held out: lower data.streaming.validation = "
                f"{data.streaming.validation}, or name data.validation_path"
            )
    return _joined(windows, [source.title for source in data.sources])
