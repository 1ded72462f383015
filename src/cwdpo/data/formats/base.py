"""What a data format is, and which format a set of columns belongs to.

A format is one file of this folder with one class; nothing else lists it. One outside the package is named
``path/to/file.py:ClassName`` in ``data.format``.
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
    """Columns by which a format is known: those that must be there, and those that must not."""

    need: frozenset[str]
    without: frozenset[str]

    @classmethod
    def of(cls, words: str) -> Columns:
        """From one entry of :attr:`Format.columns`.

        >>> Columns.of("messages chosen !prompt").without
        frozenset({'prompt'})
        """
        need = frozenset(w for w in words.split() if not w.startswith("!"))
        return cls(need, frozenset(w[1:] for w in words.split() if w.startswith("!")))

    def match(self, columns: Set[str]) -> bool:
        """Whether these columns can be this format."""
        return self.need <= columns and not self.without & columns


class Format(Component, ABC):
    """One way to write an example as a row.

    Class attributes:
        columns: the sets of columns by which the format is known, as words; one set is enough. ``!column`` must not
            be there. A set that holds another format's wins over it (:func:`find_format`), so a new format never
            needs a change in an old one.
        examples: rows of this format that give one example or more, for tests and readers; a picture is ``a.png``.
        reads: columns of :data:`cwdpo.data.columns.MEANING` that :meth:`parse` understands. Any other column of that
            table is refused before a row is parsed.
    """

    columns: ClassVar[tuple[str, ...]]
    examples: ClassVar[tuple[Mapping[str, Any], ...]]
    reads: ClassVar[frozenset[str]] = frozenset()

    def joined(self, rows: Iterator[RawRow], notes: list[str]) -> Iterator[RawRow]:
        """The rows as :meth:`parse` takes them. A format whose examples take several rows joins these here.

        Args:
            rows: the rows of the source; the value of one that cannot be read is a RowError, to be passed on.
            notes: for a line that says what was joined, once all rows are read.
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
        """The file's name for a shipped format, the class's for a user's own."""
        package, _, module = type(self).__module__.rpartition(".")
        return module if package == FORMATS.package else type(self).__name__

    @classmethod
    def signatures(cls) -> tuple[Columns, ...]:
        """:attr:`columns`, parsed."""
        return tuple(Columns.of(words) for words in cls.columns)

    @classmethod
    def matched(cls, columns: Set[str]) -> list[frozenset[str]]:
        """Every set of columns by which these are known as this format; empty where they are not."""
        return [one.need for one in cls.signatures() if one.match(columns)]


FORMATS: Registry[Format] = Registry("data format", "cwdpo.data.formats", Format)


def find_format(spec: Spec, columns: Set[str], where: str) -> Format:
    """The format that ``spec`` names; for ``auto`` the one that the columns belong to.

    Of several formats that know the columns, one gives way to another if each set by which it knows them is part of
    a larger set of the other: ``chosen rejected`` (TRL) gives way to ``messages chosen rejected`` (LLaMA-Factory).

    Raises:
        UnknownComponentError: no such format, file or class.
        RecipeError: a setting of the format that does not exist.
        DataError: columns that match no format, or several of which none gives way.
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
        "Rename the columns, set data.format to have each row's problem named, or write a format of your own "
        "(data.format: file.py:ClassName)"
    )


def _gives_way(sets: list[frozenset[str]], other: list[frozenset[str]]) -> bool:
    return bool(other) and all(any(one < larger for larger in other) for one in sets)


def _nearest(columns: Set[str]) -> str:
    """What would have to be added or taken away for each of the formats of which most is there."""
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
