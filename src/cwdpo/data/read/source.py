"""Raw rows as stored, and their source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.data.problems import RowError


@dataclass(frozen=True)
class RawRow:
    """A row as stored, or the error if it cannot be read.

    ``line`` is its line in a ``.jsonl`` file, without the line feed. ``again`` marks a repetition of a row that a
    registry sets (``repeat_time``).
    """

    file: str
    number: int
    value: dict[str, Any] | RowError
    line: bytes | None = None
    again: bool = False


@dataclass(frozen=True)
class Source:
    """A source of rows. Image paths are relative to ``folder``; ``None`` for the hub.

    ``files`` are the data files, read one after another; empty for folders of ``save_to_disk``. ``format`` is set if a
    registry states it.
    """

    name: str
    folder: Path | None
    rows: Callable[[], Iterator[RawRow]]
    files: tuple[Path, ...] = ()
    format: str = "auto"


def as_row(file: str, number: int, value: Any, line: bytes | None = None) -> RawRow:
    """A stored value as a row; a value that is not an object with keys is an error."""
    if isinstance(value, dict):
        return RawRow(file, number, value, line)
    error = RowError(
        "not-an-object",
        "",
        f"{type(value).__name__} is not an object with keys",
        'write each row as {"key": value, ...}',
    )
    return RawRow(file, number, error)
