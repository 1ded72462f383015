"""Reads a source window by window while a run goes on: only the examples of the current window are kept.

What is in a window depends on the source and on where the window begins, not on what was read before. So a resumed run
reads the same windows.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from cwdpo.data.digests import as_text
from cwdpo.data.facts import ImageStats, VideoStats
from cwdpo.data.formats.base import Format, Spec
from cwdpo.data.images import ImageFolder
from cwdpo.data.problems import Problem, RowError, printable
from cwdpo.data.read.files import LIST
from cwdpo.data.read.packed import kind_of
from cwdpo.data.read.parse import ParsedRows
from cwdpo.data.read.source import RawRow, Source
from cwdpo.data.rowparts import ReadOptions
from cwdpo.errors import DataError
from cwdpo.files.stored import Stored
from cwdpo.records import SAMPLING, Example, VideoSampling

OTHER_ROWS = (
    "restore them; continue with the changed ones with --accept-changes; or start a new run in another --out"
)
"""What to do where the rows are not those that the run has read."""


@dataclass(frozen=True)
class Place:
    """Where a window begins.

    Attributes:
        turn: how often the whole source was read before.
        row: rows of this turn before it.
        example: examples of the next row that are before it.
    """

    turn: int = 0
    row: int = 0
    example: int = 0


@dataclass
class Window:
    """Examples that are trained on together.

    Attributes:
        name: of the source.
        begin: its place.
        digest: of the rows of its turn before :attr:`begin`.
        end: its end, where the next window begins.
        examples: kept on disk.
        rows, bad_rows: rows that were read for it, and those with a problem.
        problems: of these rows.
        ended: whether the source's last row was reached.
        notes: lines about columns and images, for the user.
    """

    name: str
    begin: Place
    digest: str
    end: Place = Place()
    examples: Stored[Example] = field(default_factory=Stored)
    rows: int = 0
    bad_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    ended: bool = False
    notes: tuple[str, ...] = ()


class RowStream:
    """The examples of a source in stored order, and from the first one again when all were read.

    Args:
        source: the rows.
        takes: which examples are wanted; the others are passed over.
        format, image_root, default_prompt, captions_per_image, ignore_columns, video: as in
            :func:`cwdpo.data.read.reader.read_examples`.

    Raises:
        DataError: the source cannot be read row by row.
    """

    def __init__(
        self,
        source: Source,
        takes: Callable[[Example], bool] = lambda example: True,
        *,
        format: Spec = "auto",
        image_root: Path | None = None,
        default_prompt: str = "Describe the image.",
        captions_per_image: int = 1,
        ignore_columns: Collection[str] = (),
        video: VideoSampling = SAMPLING,
    ) -> None:
        if any(kind_of(file) in LIST for file in source.files):
            raise DataError(
                f"{source.name}: a .json list is read as a whole and cannot be streamed: write an object per line into "
                "a .jsonl file, or leave out data.streaming"
            )
        self.name, self._source, self._takes = source.name, source, takes
        self._format: Spec = source.format if format == "auto" else format
        self._root = image_root or source.folder
        self._options = ReadOptions(default_prompt, captions_per_image, frozenset(ignore_columns), video)
        self._rows, self._at = _Rows(source), Place()

    def window(
        self, begin: Place, size: int, *, once: bool = False, known: Mapping[int, str] | None = None
    ) -> Window:
        """The next ``size`` examples from a place on.

        Args:
            begin: the place.
            size: number of examples.
            once: end with the source's last row; else go on with the first one.
            known: digests of the rows before some rows of this turn, which are compared on the way to ``begin``.

        Raises:
            DataError: the source cannot be read, has fewer examples that are wanted (with ``once``: none), or rows
                before ``begin`` are not those of ``known``.
        """
        if self._at != begin:
            self._go_to(begin, known or {})
        window = Window(self.name, begin, self._rows.digest)
        turn, skip, whole = begin.turn, begin.example, begin.row == begin.example == 0
        while (example := self._fill(window, size, skip)) is None:
            window.ended = True
            if whole and not window.examples:
                raise DataError(f"{self.name}: none of {self._rows.used} rows is one to train on")
            if once:
                example = 0
                break
            if whole:
                raise DataError(
                    f"{self.name}: {self._rows.used} rows have fewer than {size} examples to train on, which a window "
                    "takes of it: lower data.streaming.window"
                )
            self._rows = _Rows(self._source)
            turn, skip, whole = turn + 1, 0, True
        window.end = self._at = Place(turn, self._rows.used, example)
        return window

    def _go_to(self, begin: Place, known: Mapping[int, str]) -> None:
        self._rows, last = _Rows(self._source), 0
        if self._format == "auto":  # it follows from the first rows, not from those of the window
            self._parsed(ImageFolder(None, "none"))
        for row in sorted({*(row for row in known if row <= begin.row), begin.row}):
            if not self._rows.pass_over(row):
                raise DataError(
                    f"{self.name}: has {self._rows.used} rows, but this run has read {begin.row}: {OTHER_ROWS}"
                )
            if row in known and known[row] != self._rows.digest:
                raise DataError(
                    f"{self.name}: rows {last + 1} to {row} are not those that this run has read: {OTHER_ROWS}"
                )
            last = row

    def _fill(self, window: Window, size: int, skip: int) -> int | None:
        """Add examples up to ``size``; the number of the next row's first new example, or ``None`` without a next row.

        Args:
            skip: examples of the first row that are left out.
        """
        if not self._rows.more():
            return None
        images, videos = ImageStats(), VideoStats()
        parsed = self._parsed(ImageFolder(self._root, "identify", images.add, videos.add))
        try:
            for row in parsed:
                if not skip:
                    window.rows += 1
                    window.bad_rows += bool(row.problems)
                    window.problems += row.problems
                for number, example in enumerate(row.examples[skip:], start=skip + 1):
                    if self._takes(example):
                        window.examples.append(example)
                    if len(window.examples) == size and number < len(row.examples):
                        return number
                skip = 0
                self._rows.use()
                if len(window.examples) == size:
                    return 0
        finally:
            notes = (*parsed.notes(), *images.notes(), *videos.notes())
            window.notes += tuple(printable(f"{self.name}: {note}") for note in notes)
        return None

    def _parsed(self, folder: ImageFolder) -> ParsedRows:
        parsed = ParsedRows(replace(self._source, rows=self._rows.rest), self._format, folder, self._options)
        if type(parsed.format).joined is not Format.joined:
            raise DataError(
                f"{self.name}: format {parsed.format.name} joins rows from anywhere in the set, so it cannot be "
                "streamed: join them first, or leave out data.streaming"
            )
        if self._format == "auto":
            self._format = parsed.format.name
        return parsed


class _Rows:
    """The rows of a source, once.

    Attributes:
        used: how many rows are done with; the others are handed out again by :meth:`rest`.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._waiting, self._out = source.rows(), deque[RawRow](), deque[RawRow]()
        self.used = 0
        self._digest = blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        """Of the rows that are done with."""
        return self._digest.hexdigest()

    def more(self) -> bool:
        """Whether there is a row that is not done with."""
        return bool(self._out) or self._wait_for_one()

    def rest(self) -> Iterator[RawRow]:
        """The rows that are not done with."""
        self._waiting.extendleft(reversed(self._out))
        self._out.clear()
        while self._wait_for_one():
            self._out.append(self._waiting.popleft())
            yield self._out[-1]

    def _wait_for_one(self) -> bool:
        """Whether there is a row that is not handed out."""
        if not self._waiting:
            self._waiting.extend(one for one in [next(self._source, None)] if one is not None)
        return bool(self._waiting)

    def use(self) -> None:
        """Be done with the first row that was handed out."""
        raw = self._out.popleft()
        line = raw.line if raw.line is not None else _stored(raw).encode("utf-8", "surrogatepass")
        self._digest.update(len(line).to_bytes(8, "little") + line)
        self.used += 1

    def pass_over(self, row: int) -> bool:
        """Be done with all rows before this one; ``False`` if there are fewer."""
        rest = self.rest()
        while self.used < row:
            if next(rest, None) is None:
                return False
            self.use()
        return True


def _stored(raw: RawRow) -> str:
    """A text with all that a row holds."""
    return json.dumps(repr(raw.value) if isinstance(raw.value, RowError) else raw.value, default=as_text)
