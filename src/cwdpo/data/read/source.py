"""What a reader gives: rows as stored, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.data.problems import RowError


@dataclass(frozen=True)
class RawRow:
    """A row as stored, or the reason why it cannot be understood as one.

    ``line`` is its line in a ``.jsonl`` file, without the line feed. ``again`` marks the repetitions of a row that a
    registry asks for (``repeat_time``).
    """

    file: str
    number: int
    value: dict[str, Any] | RowError
    line: bytes | None = None
    again: bool = False


@dataclass(frozen=True)
class Source:
    """Where rows come from. ``folder`` is where image paths start from; ``None`` for the hub.

    ``files`` are the data files that are read, one after the other; none for folders of ``save_to_disk``. ``format`` is
    what a registry says of them.
    """

    name: str
    folder: Path | None
    rows: Callable[[], Iterator[RawRow]]
    files: tuple[Path, ...] = ()
    format: str = "auto"


def as_row(file: str, number: int, value: Any, line: bytes | None = None) -> RawRow:
    """A stored value as a row; anything but an object with keys is a problem of its own."""
    if isinstance(value, dict):
        return RawRow(file, number, value, line)
    error = RowError(
        "not-an-object",
        "",
        f"{type(value).__name__} where an object with keys belongs",
        'write each row as {"key": value, ...}',
    )
    return RawRow(file, number, error)
