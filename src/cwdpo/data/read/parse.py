"""Parses raw rows into Examples with a format, one row at a time; a problem is reported, not guessed around."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from cwdpo.data.columns import FOR_JUDGES, present, refuse_unread
from cwdpo.data.digests import FirstPlaces, digest8
from cwdpo.data.formats.base import Spec, find_format
from cwdpo.data.images import ImageFolder
from cwdpo.data.problems import Problem, RowError, explain_problems, shown
from cwdpo.data.read.source import RawRow, Source
from cwdpo.data.rowparts import ReadOptions, Row
from cwdpo.errors import DataError
from cwdpo.records import Example, ImageRef, VideoRef

_PEEKED_ROWS = 16  # rows used to find the format; the first row may lack optional columns


@dataclass(frozen=True)
class ParsedRow:
    """The result of one row; if a negative was left out, the row has both examples and problems.

    ``columns`` are the columns that are not null, ``unread`` those with a value that were not read. ``pictures`` are
    the row's images and videos by key (``images[0]``).
    """

    raw: RawRow
    columns: frozenset[str]
    examples: list[Example]
    problems: list[Problem] = field(default_factory=list)
    unread: frozenset[str] = frozenset()
    pictures: Mapping[str, ImageRef | VideoRef] = field(default_factory=dict)


class ParsedRows:
    """The rows of a source, parsed one by one while iterating; rows are not kept.

    Args:
        source: the rows.
        format: ``auto``, a name, ``file.py:ClassName``, or a mapping with ``name`` and settings; ``auto`` is the format
            that the source states, if any.
        folder: the folder of the images.
        options: settings for reading.

    Raises:
        CwdpoError: as in :func:`cwdpo.data.read.reader.read_examples`, except for bad rows and empty data sets.
    """

    def __init__(self, source: Source, format: Spec, folder: ImageFolder, options: ReadOptions) -> None:
        if options.captions_per_image < 1:
            raise DataError(f"data.captions_per_image = {options.captions_per_image}; allowed: 1 or more")
        if folder.root is not None and not folder.root.is_dir():
            raise DataError(
                f"data.image_root: there is no folder {str(folder.root)!r}; name the folder of the images"
            )
        self._folder, self._options, self._name = folder, options, source.name
        stream = source.rows()
        peeked = list(islice(stream, _PEEKED_ROWS))
        if not peeked:
            raise DataError(f"{source.name}: no rows; use a data set with at least one")
        if all(isinstance(raw.value, RowError) for raw in peeked):
            problems = [
                raw.value.at(raw.file, raw.number) for raw in peeked if isinstance(raw.value, RowError)
            ]
            raise DataError(
                f"{source.name}: none of the first {len(peeked)} rows can be read\n{explain_problems(problems)}"
            )
        columns = frozenset[str]().union(*(_columns(raw) for raw in peeked)) - options.ignore
        self.format = find_format(source.format if format == "auto" else format, columns, source.name)
        self.unread: Counter[str] = Counter()
        """For each column that the format does not read, the number of rows with a value in it."""
        self._joined: list[str] = []
        self._rows = self.format.joined(map(self._without_ignored, chain(peeked, stream)), self._joined)
        self._ids = FirstPlaces()

    def __iter__(self) -> Iterator[ParsedRow]:
        for raw in self._rows:
            row = self._parsed(raw)
            self.unread.update(row.unread)
            yield row

    def notes(self) -> list[str]:
        """Notes about the rows read so far, other than problems; one line each."""
        notes = list(self._joined)
        if self._options.ignore:
            notes.append(f"columns ignored as asked: {', '.join(sorted(self._options.ignore))}")
        if self.unread:
            said = ", ".join(f"{key} ({n} rows)" for key, n in sorted(self.unread.items()))
            notes.append(f"columns not read in training (kept for judges and metrics): {said}")
        return notes

    def _without_ignored(self, raw: RawRow) -> RawRow:
        if isinstance(raw.value, RowError) or not self._options.ignore.intersection(raw.value):
            return raw
        return replace(raw, value={k: v for k, v in raw.value.items() if k not in self._options.ignore})

    def _parsed(self, raw: RawRow) -> ParsedRow:
        columns = _columns(raw)
        if isinstance(raw.value, RowError):
            return ParsedRow(raw, columns, [], [raw.value.at(raw.file, raw.number)])
        row = Row(raw.value, raw.file, raw.number, self._folder, self._options)
        try:
            refuse_unread(raw.value, self.format.reads)
            examples = self.format.parse(row)
            digests = _new_ids(examples, self._ids)
        except RowError as error:
            problem = error.at(raw.file, raw.number)
            return ParsedRow(raw, columns, [], [problem], pictures=row.pictures)
        for digest in digests:
            self._ids.add(digest, raw.file, raw.number)
        said = frozenset(key for key in columns if present(raw.value[key]))
        return ParsedRow(
            raw,
            columns,
            examples,
            [error.at(raw.file, raw.number) for error in row.dropped],
            said - row.used - FOR_JUDGES,
            row.pictures,
        )


def _columns(raw: RawRow) -> frozenset[str]:
    if isinstance(raw.value, RowError):
        return frozenset()
    return frozenset(key for key, value in raw.value.items() if value is not None)


def _new_ids(examples: list[Example], ids: FirstPlaces) -> list[int]:
    """Digests of the examples' ids; an error if an id was used before."""
    digests = [digest8(example.id.encode("utf-8", "surrogatepass")) for example in examples]
    for example, digest in zip(examples, digests, strict=True):
        before = ids.find(digest)
        if before is not None:
            raise RowError(
                "duplicate-id",
                "id",
                f"{shown(example.id)} was used before, by {before}; the row was left out",
                "give each row its own 'id' (captions of one picture belong in one row)",
            )
    return digests
