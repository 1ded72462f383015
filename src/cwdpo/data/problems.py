"""Problems of rows: the error inside the readers, and the record that users see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHOWN_ROWS = 5


def shown(value: Any, limit: int = 80) -> str:
    """``repr`` of a value, cut if it is long: a cell may contain a whole image as text.

    >>> shown("a" * 100, 5)
    "'aaaaa'... (100 characters)"
    """
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} {'characters' if isinstance(value, str) else 'bytes'})"
    text = repr(value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."


@dataclass(frozen=True)
class Problem:
    """One problem of one row: where it is, what is wrong (and allowed), and what to do.

    ``row`` is counted from 1: the line of a ``.jsonl`` file, or the position in the list or table. ``kind`` is a short
    name (``image-missing``); problems are counted by kind.
    """

    file: str
    row: int
    key: str
    kind: str
    message: str
    remedy: str

    def __str__(self) -> str:
        key = f" [{self.key}]" if self.key else ""
        return f"{self.file}:{self.row}{key}: {self.message}"


class RowError(Exception):
    """A row, or one of its negatives, cannot be used. Inside this room only; users see a :class:`Problem`."""

    def __init__(self, kind: str, key: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.kind, self.key, self.message, self.remedy = kind, key, message, remedy

    def at(self, file: str, row: int) -> Problem:
        """The error as a record with its file and row."""
        return Problem(file, row, self.key, self.kind, self.message, self.remedy)


@dataclass
class ProblemGroup:
    """All problems of one kind: their number, and the first few."""

    kind: str
    count: int
    first: list[Problem]

    @property
    def remedy(self) -> str:
        """What to do about the first one."""
        return self.first[0].remedy

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "kind": self.kind,
            "count": self.count,
            "remedy": self.remedy,
            "first": [asdict(problem) for problem in self.first],
        }

    def __str__(self) -> str:
        rows = "\n".join(f"    {problem}" for problem in self.first)
        more = f"\n    ... and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"  {self.kind} x {self.count}\n{rows}{more}\n    to do: {self.remedy}"


class ProblemLog:
    """Counts problems by kind and keeps the first few of each, so that memory does not grow with the data."""

    def __init__(self) -> None:
        self._groups: dict[str, ProblemGroup] = {}

    def add(self, problem: Problem) -> None:
        """Count one problem."""
        group = self._groups.setdefault(problem.kind, ProblemGroup(problem.kind, 0, []))
        group.count += 1
        if len(group.first) < SHOWN_ROWS:
            group.first.append(problem)

    def groups(self) -> list[ProblemGroup]:
        """The groups, most frequent first."""
        return sorted(self._groups.values(), key=lambda group: (-group.count, group.kind))


def printable(text: str) -> str:
    """The text with control, bidi and surrogate characters escaped; line breaks are kept.

    Text from data cannot be trusted: a terminal would execute escape sequences, and half of a surrogate pair cannot be
    written to a pipe.
    """
    if text.replace("\n", "").isprintable():
        return text
    shown = (c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def explain_problems(problems: Iterable[Problem]) -> str:
    """Counts by kind, the first rows of each, and what to do, as indented text."""
    log = ProblemLog()
    for problem in problems:
        log.add(problem)
    return join_groups(log.groups())


def join_groups(groups: Sequence[ProblemGroup]) -> str:
    """Problem groups as indented text."""
    return "\n".join(str(group) for group in groups)
