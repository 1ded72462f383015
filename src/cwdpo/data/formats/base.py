"""The interface of a data format, and how the format is found from the columns.

A format is one class in one file of this folder. A format outside the package is named ``path/to/file.py:ClassName``
in ``data.format``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from cwdpo.data.read.source import RawRow
from cwdpo.data.rowparts import Row
from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.registry import Component, Registry

Spec = str | Mapping[str, Any]
"""``auto``, a name, ``file.py:ClassName``, or a mapping with ``name`` and the format's settings."""


@dataclass(frozen=True)
class Columns:
    """Columns by which a format is recognised: those that must exist, and those that must not."""

    need: frozenset[str]
    without: frozenset[str]

    @classmethod
    def of(cls, words: str) -> Columns:
        """Parse one entry of :attr:`Format.columns`.

        >>> Columns.of("messages chosen !prompt").without
        frozenset({'prompt'})
        """
        need = frozenset(w for w in words.split() if not w.startswith("!"))
        return cls(need, frozenset(w[1:] for w in words.split() if w.startswith("!")))

    def match(self, columns: Set[str]) -> bool:
        """Whether these columns can be this format."""
        return self.need <= columns and not self.without & columns


class Format(Component, ABC):
    """A way to write an example as a row.

    Class attributes:
        columns: sets of columns, as words; rows with all columns of one set have this format. ``!column`` must not
            exist. A set that contains a set of another format is preferred (:func:`find_format`), so a new format
            needs no change in the others.
        examples: rows of this format that give at least one example, for tests and documentation; an image is
            ``a.png``.
        reads: columns of :data:`cwdpo.data.columns.MEANING` that :meth:`parse` reads. A row with another column of
            that table is an error.
    """

    columns: ClassVar[tuple[str, ...]]
    examples: ClassVar[tuple[Mapping[str, Any], ...]]
    reads: ClassVar[frozenset[str]] = frozenset()

    def joined(self, rows: Iterator[RawRow], notes: list[str]) -> Iterator[RawRow]:
        """The rows for :meth:`parse`. A format whose examples need several rows joins these rows here.

        Args:
            rows: the rows of the source; a row that cannot be read has a RowError as its value and must be passed on.
            notes: a line about the joined rows may be appended after all rows are read.
        """
        del notes
        return rows

    @abstractmethod
    def parse(self, row: Row) -> list[Example]:
        """The examples of one row, built with :meth:`cwdpo.data.rowparts.Row.example`.

        Raises:
            RowError: the row cannot be used; it is left out and counted.
        """

    @property
    def name(self) -> str:
        """The name of the file for a shipped format, or of the class for a format outside the package."""
        package, _, module = type(self).__module__.rpartition(".")
        return module if package == FORMATS.package else type(self).__name__

    @classmethod
    def signatures(cls) -> tuple[Columns, ...]:
        """:attr:`columns`, parsed."""
        return tuple(Columns.of(words) for words in cls.columns)

    @classmethod
    def matched(cls, columns: Set[str]) -> list[frozenset[str]]:
        """All sets of this format that match the columns; empty if the columns are not of this format."""
        return [one.need for one in cls.signatures() if one.match(columns)]


FORMATS: Registry[Format] = Registry("data format", "cwdpo.data.formats", Format)


def find_format(spec: Spec, columns: Set[str], where: str) -> Format:
    """The format that ``spec`` names; for ``auto``, the format of the columns.

    If several formats match, a format is dropped if each of its matching sets is part of a larger set of another
    format: ``chosen rejected`` (TRL) is dropped for ``messages chosen rejected`` (LLaMA-Factory).

    Raises:
        UnknownComponentError: there is no such format, file or class.
        RecipeError: the format has no such setting.
        DataError: no format matches the columns, or several do.
    """
    if spec != "auto":
        return FORMATS.build(spec)
    known = {name: FORMATS.get(name).matched(columns) for name in FORMATS.names()}
    matching = [
        name
        for name, sets in known.items()
        if sets and not any(_gives_way(sets, other) for other in known.values())
    ]
    if len(matching) == 1:
        return FORMATS.build(matching[0])
    seen = ", ".join(sorted(columns)) or "none"
    if matching:
        raise DataError(
            f"{where}: the columns ({seen[:500]}) match several formats ({', '.join(matching)}); set data.format to one"
        )
    allowed = "; ".join(
        f"{name}: {' or '.join('+'.join(sorted(one.need)) for one in FORMATS.get(name).signatures())}"
        for name in FORMATS.names()
    )
    raise DataError(
        f"{where}: the columns ({seen[:500]}) match no known format{_nearest(columns)}; allowed: {allowed}. "
        "Rename the columns, set data.format to see the problem of each row, or write a format of your own "
        "(data.format: file.py:ClassName)"
    )


def _gives_way(sets: list[frozenset[str]], other: list[frozenset[str]]) -> bool:
    return bool(other) and all(any(one < larger for larger in other) for one in sets)


def _nearest(columns: Set[str]) -> str:
    """The columns to add or remove for the formats with the most matching columns."""
    groups = [
        (name, one)
        for name in FORMATS.names()
        for one in FORMATS.get(name).signatures()
        if one.need & columns
    ]
    if not groups:
        return ""
    near = [len(one.need & columns) - len(one.need - columns) for _, one in groups]
    told = []
    for (name, one), score in zip(groups, near, strict=True):
        lacks = [repr(column) for column in sorted(one.need - columns)]
        against = [repr(column) for column in sorted(one.without & columns)]
        if score == max(near) and (lacks or against):
            changes = [f"with {' and '.join(lacks)}"] if lacks else []
            changes += [f"without {' and '.join(against)}"] if against else []
            told.append(f"{name} {' and '.join(changes)}")
    return f"; it would be {', '.join(told)}" if told else ""
