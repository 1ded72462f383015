"""From files, folders and the hub to Examples. Bad rows are left out and named, never guessed at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from cwdpo.data.digests import FirstPlaces, digest8
from cwdpo.data.formats.base import Format, find_format
from cwdpo.data.images import CheckImages, ImageFolder
from cwdpo.data.problems import Problem, RowError, explain_problems
from cwdpo.data.read.rows import RawRow, Source, iter_rows, open_source
from cwdpo.data.rowparts import ReadOptions, Row
from cwdpo.errors import DataError
from cwdpo.records import Example

__all__ = ["ParsedRow", "Problem", "ReadResult", "iter_rows", "parse_rows", "read_examples"]

_PEEKED_ROWS = 16  # optional columns may be absent from the first row


@dataclass(frozen=True)
class ReadResult:
    """The usable examples, and everything that was wrong with the others.

    ``rows`` and ``bad_rows`` count the rows read and those with at least one problem.
    """

    examples: list[Example]
    problems: list[Problem]
    format: str
    rows: int
    bad_rows: int


@dataclass(frozen=True)
class ParsedRow:
    """What became of one row. A row whose negative was left out has examples and problems."""

    raw: RawRow
    columns: frozenset[str]
    examples: list[Example]
    problems: list[Problem] = field(default_factory=list)


def read_examples(
    path: str | Path | Source,
    *,
    format: str = "auto",
    max_bad_fraction: float = 0.01,
    image_root: Path | None = None,
    default_prompt: str = "Describe the image.",
    limit: int | None = None,
    captions_per_image: int = 1,
    check_images: CheckImages = "identify",
) -> ReadResult:
    """Read a data set (see :func:`iter_rows` for what ``path`` may be) into Examples, in stored order.

    A row that cannot be used is left out; a negative that is empty or equals the chosen response is left out
    of its row. Both are problems, and the row counts as bad. Of rows with the same id the first is kept.

    Args:
        path: file, folder, hub id, or an opened source (:func:`cwdpo.data.read.rows.rows_source`).
        format: ``auto`` or a name of :data:`cwdpo.data.formats.base.FORMATS`.
        max_bad_fraction: the share of rows, 0 to 1, that may have a problem.
        image_root: where image paths start from and must stay; the data file's folder when ``None``.
        default_prompt: the question where rows have none (``captions``).
        limit: stop after this many examples.
        captions_per_image: examples made of one captioned picture (``captions``).
        check_images: ``none``, ``exists``, ``identify`` (reads headers) or ``decode`` (reads every pixel).

    Raises:
        DataError: nothing to read, an unknown format, too many bad rows, or no usable row.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"data.max_bad_fraction = {max_bad_fraction}; allowed: 0 to 1")
    if limit is not None and limit < 1:
        raise DataError(f"data.limit = {limit}; allowed: 1 or more, or null for all")
    source = path if isinstance(path, Source) else open_source(path)
    folder = ImageFolder(image_root or source.folder, check_images)
    form, parsed = parse_rows(source, format, folder, ReadOptions(default_prompt, captions_per_image))
    examples: list[Example] = []
    problems: list[Problem] = []
    rows = bad_rows = 0
    for row in parsed:
        rows += 1
        bad_rows += bool(row.problems)
        examples += row.examples
        problems += row.problems
        if limit is not None and len(examples) >= limit:
            del examples[limit:]
            break
    if rows and bad_rows > max_bad_fraction * rows:
        raise DataError(
            f"{source.name}: {bad_rows} of {rows} rows are bad, more than data.max_bad_fraction = "
            f"{max_bad_fraction:g} allows (format {form.name})\n{explain_problems(problems)}\n"
            "Fix these rows, or raise data.max_bad_fraction to go on without them."
        )
    if not examples:
        detail = f"\n{explain_problems(problems)}" if problems else ""
        raise DataError(f"{source.name}: no usable row among {rows}; give a set with at least one{detail}")
    return ReadResult(examples, problems, form.name, rows, bad_rows)


def parse_rows(
    source: Source, format: str, folder: ImageFolder, options: ReadOptions
) -> tuple[Format, Iterator[ParsedRow]]:
    """The format of the source and its rows, parsed as they are read; no row is kept.

    Raises:
        DataError: as :func:`read_examples`, but bad rows and empty sets are left to the caller.
    """
    if options.captions_per_image < 1:
        raise DataError(f"data.captions_per_image = {options.captions_per_image}; allowed: 1 or more")
    if folder.root is not None and not folder.root.is_dir():
        raise DataError(
            f"data.image_root: there is no folder {str(folder.root)!r}; name the folder of the images"
        )
    stream = source.rows()
    peeked = list(islice(stream, _PEEKED_ROWS))
    if not peeked:
        raise DataError(f"{source.name}: no rows; give a set with at least one")
    if all(isinstance(raw.value, RowError) for raw in peeked):
        problems = [raw.value.at(raw.file, raw.number) for raw in peeked if isinstance(raw.value, RowError)]
        raise DataError(
            f"{source.name}: none of the first {len(peeked)} rows can be read\n{explain_problems(problems)}"
        )
    columns = frozenset[str]().union(*(_columns(raw) for raw in peeked))
    form = find_format(source.format if format == "auto" else format, columns, source.name)

    def rows() -> Iterator[ParsedRow]:
        ids = FirstPlaces()
        for raw in chain(peeked, stream):
            yield _parse_row(raw, form, folder, options, ids)

    return form, rows()


def _columns(raw: RawRow) -> frozenset[str]:
    if isinstance(raw.value, RowError):
        return frozenset()
    return frozenset(key for key, value in raw.value.items() if value is not None)


def _parse_row(
    raw: RawRow, form: Format, folder: ImageFolder, options: ReadOptions, ids: FirstPlaces
) -> ParsedRow:
    """``ids`` knows where each id so far was first used."""
    columns = _columns(raw)
    if isinstance(raw.value, RowError):
        return ParsedRow(raw, columns, [], [raw.value.at(raw.file, raw.number)])
    row = Row(raw.value, raw.file, raw.number, folder, options)
    try:
        examples = form.parse(row)
        digests = _new_ids(examples, ids)
    except RowError as error:
        return ParsedRow(raw, columns, [], [error.at(raw.file, raw.number)])
    for digest in digests:
        ids.add(digest, raw.file, raw.number)
    return ParsedRow(raw, columns, examples, [error.at(raw.file, raw.number) for error in row.dropped])


def _new_ids(examples: list[Example], ids: FirstPlaces) -> list[int]:
    """Digests of the examples' ids, none of which may have been used before."""
    digests = [digest8(example.id.encode("utf-8", "surrogatepass")) for example in examples]
    for example, digest in zip(examples, digests, strict=True):
        before = ids.find(digest)
        if before is not None:
            raise RowError(
                "duplicate-id",
                "id",
                f"{example.id!r} was used before, by {before}; the row was left out",
                "give each row its own 'id' (captions of one picture belong in one row)",
            )
    return digests
