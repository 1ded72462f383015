"""The data of a run that is streamed (``data.streaming``): each stage reads the source by itself, window by window.

Which rows a stage gets is decided row by row, from the images of the row and of the held-out rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from cwdpo.config import Recipe
from cwdpo.data.problems import Problem, explain_problems, printable
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import open_source
from cwdpo.data.read.stream import Place, RowStream, Window
from cwdpo.data.split import content_keys, part_of
from cwdpo.errors import DataError, RecipeError
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import Splits, stage1_share, with_negatives
from cwdpo.stage.stage import StageName
from cwdpo.waiting import processes

FILE = "windows.jsonl"
"""What the windows of a run are, a line for each."""
_HELD_OUT = "has an image that is held out"
_MIXED = "has images of both stages"
_ALONE = "has no negative"


class StageStream:
    """The windows of a stage.

    Raises:
        RecipeError: a window has fewer rows than an optimizer step.

    Args:
        recipe: the recipe of the run, with ``data.streaming``.
        run: the run folder, for problems.
        name: the stage.
        held_out: :func:`cwdpo.data.split.content_keys` of the held-out rows, which are not trained on.

    Attributes:
        size: examples of a window: ``data.streaming.window``, rounded down to whole optimizer steps.
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
        self.rows = RowStream(open_source(str(data.path), streaming=True), self._takes, **data.reading)
        self.first = self.read(Place(), once=True)

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
        begin: Place,
        *,
        once: bool = False,
        known: Mapping[int, str] | None = None,
        before: tuple[int, int] = (0, 0),
    ) -> Window:
        """A window.

        Args:
            begin: where it begins.
            once, known: see :meth:`cwdpo.data.read.stream.RowStream.window`.
            before: rows and bad rows of earlier windows.

        Raises:
            DataError: more than ``data.max_bad_fraction`` of all rows so far are bad; or see there.
        """
        window = self.rows.window(begin, self.size, once=once, known=known)
        most, rows, bad = (
            self._recipe.data.max_bad_fraction,
            before[0] + window.rows,
            before[1] + window.bad_rows,
        )
        if bad > most * rows:
            raise DataError(
                f"{self.rows.name}: {bad} of {rows} rows so far are bad, more than data.max_bad_fraction = {most:g} "
                f"allows; of this window:\n{explain_problems(window.problems)}\n"
                "Fix these rows, or raise data.max_bad_fraction to continue without them."
            )
        return window

    def with_negatives(self, window: Window) -> Sequence[Example]:
        """The examples of a window with the negatives of the recipe's mix, drawn among the window's examples."""
        if self.name == "stage1":
            return with_negatives(window.examples, self._recipe, self._run, need=False)
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
    held_out: frozenset[bytes] = frozenset()
    if data.validation_path is None:
        rows = RowStream(open_source(str(data.path), streaming=True), **data.reading)
        window = rows.window(Place(), data.streaming.validation, once=True)
        if window.ended:
            raise DataError(
                f"{data.path}: has {window.rows} rows, and data.streaming.validation = {data.streaming.validation} are "
                "held out: lower it, or name data.validation_path"
            )
        validation: Sequence[Example] = window.examples
        held_out = frozenset(key for example in validation for key in content_keys(example))
        notes.append(f"{rows.name}: the first {len(validation)} examples are held out")
    else:
        found = read_examples(data.validation_path, **data.reading, max_bad_fraction=data.max_bad_fraction)
        validation, notes = found.examples, list(found.notes)
        problems += found.problems
    names: tuple[StageName, ...] = ("stage1", "stage2")
    streams = {n: StageStream(recipe, run, n, held_out) for n in names if getattr(recipe, n).enabled}
    parts: dict[str, Sequence[Example]] = {}
    for name, stream in streams.items():
        parts[name] = stream.with_negatives(stream.first)
        notes += [*stream.first.notes, *stream.notes()]
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
        with_negatives(validation, recipe, run, need=False),
        tuple(notes),
        streams,
    )
