"""Reads files, folders and data sets of the hub into Examples; bad rows are left out and reported."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cwdpo.data.facts import ImageStats, VideoStats
from cwdpo.data.formats.base import Spec
from cwdpo.data.images import CheckImages, ImageFolder
from cwdpo.data.problems import Problem, explain_problems, printable
from cwdpo.data.read.parse import ParsedRows
from cwdpo.data.read.rows import open_source
from cwdpo.data.read.source import Source
from cwdpo.data.rowparts import ReadOptions
from cwdpo.errors import DataError
from cwdpo.files.stored import Stored
from cwdpo.records import SAMPLING, Example, VideoSampling


@dataclass(frozen=True)
class ReadResult:
    """The usable examples, which are kept on disk, and all problems of the rows.

    ``rows`` counts the rows read, ``bad_rows`` those with at least one problem. ``notes`` are lines that a user should
    see once: columns that were not read, images that were changed.
    """

    examples: Sequence[Example]
    problems: list[Problem]
    format: str
    rows: int
    bad_rows: int
    notes: tuple[str, ...] = ()


def read_examples(
    path: str | Path | Source,
    *,
    format: Spec = "auto",
    max_bad_fraction: float = 0.01,
    image_root: Path | None = None,
    default_prompt: str = "Describe the image.",
    limit: int | None = None,
    captions_per_image: int = 1,
    check_images: CheckImages = "identify",
    ignore_columns: Collection[str] = (),
    video: VideoSampling = SAMPLING,
) -> ReadResult:
    """Read a data set into Examples, in stored order; for ``path`` see :func:`cwdpo.data.read.rows.iter_rows`.

    A row that cannot be used is left out. A negative that is empty or equal to chosen is left out of its row. Both are
    problems, and the row counts as bad. If several rows have the same id, the first one is kept.

    Args:
        path: file, folder, hub id, or an opened source (:func:`cwdpo.data.read.rows.rows_source`).
        format: ``auto``, a name of :data:`cwdpo.data.formats.base.FORMATS`, ``file.py:ClassName``, or a mapping
            with ``name`` and the format's settings.
        max_bad_fraction: share of rows, 0 to 1, that may have a problem.
        image_root: folder of images and videos, which paths must not leave; ``None``: the folder of the data file.
        default_prompt: the question for rows without one (format ``captions``).
        limit: stop after this many examples.
        captions_per_image: number of examples from one image with captions (format ``captions``).
        check_images: ``none``, ``exists``, ``identify`` (reads headers) or ``decode`` (reads all pixels).
        ignore_columns: columns to ignore.
        video: which frames of videos are kept.

    Raises:
        DataError: there are no rows, no format has these columns, too many rows are bad, or none is usable.
        MissingPackageError: a row has a video, and PyAV is not installed.
        UnknownComponentError: the format, file or class is unknown.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"data.max_bad_fraction = {max_bad_fraction}; allowed: 0 to 1")
    if limit is not None and limit < 1:
        raise DataError(f"data.limit = {limit}; allowed: 1 or more, or null for all")
    source = path if isinstance(path, Source) else open_source(path)
    stats, videos = ImageStats(), VideoStats()
    folder = ImageFolder(image_root or source.folder, check_images, stats.add, videos.add)
    options = ReadOptions(default_prompt, captions_per_image, frozenset(ignore_columns), video)
    parsed = ParsedRows(source, format, folder, options)
    result = _usable(parsed, limit)
    examples, rows, bad_rows = result.examples, result.rows, result.bad_rows
    if rows and bad_rows > max_bad_fraction * rows:
        raise DataError(
            f"{source.name}: {bad_rows} of {rows} rows are bad, more than data.max_bad_fraction = "
            f"{max_bad_fraction:g} allows (format {result.format})\n{explain_problems(result.problems)}\n"
            "Fix these rows, or raise data.max_bad_fraction to continue without them."
        )
    if not examples:
        detail = f"\n{explain_problems(result.problems)}" if result.problems else ""
        raise DataError(
            f"{source.name}: none of {rows} rows is usable; use a data set with at least one{detail}"
        )
    notes = [*parsed.notes(), *stats.notes(), *videos.notes()]
    return replace(result, notes=tuple(printable(f"{source.name}: {note}") for note in notes))


def _usable(parsed: ParsedRows, limit: int | None) -> ReadResult:
    """The examples of all rows, or the first ``limit`` of them, and all problems of the rows read."""
    examples: Stored[Example] = Stored()
    problems: list[Problem] = []
    rows = bad_rows = 0
    for row in parsed:
        rows += 1
        bad_rows += bool(row.problems)
        problems += row.problems
        for example in row.examples[: None if limit is None else limit - len(examples)]:
            examples.append(example)
        if limit is not None and len(examples) >= limit:
            break
    return ReadResult(examples, problems, parsed.format.name, rows, bad_rows)
