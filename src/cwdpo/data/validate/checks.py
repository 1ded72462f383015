"""Checks a data set before a model is loaded: how it is read, what is wrong, and what to repair."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cwdpo.data.contents import video_digest
from cwdpo.data.digests import DigestMap, FirstPlaces, digest8
from cwdpo.data.encode.template import RefusedRowError
from cwdpo.data.facts import ImageStats, VideoStats
from cwdpo.data.formats.base import Spec
from cwdpo.data.images import CheckImages, ImageFolder
from cwdpo.data.problems import SHOWN_ROWS, Problem, ProblemLog, RowError
from cwdpo.data.read.parse import ParsedRow, ParsedRows
from cwdpo.data.read.rows import held_out_beside, open_source
from cwdpo.data.read.source import Source
from cwdpo.data.rowparts import ReadOptions, Row
from cwdpo.data.validate.fix import good_rows
from cwdpo.data.validate.lengths import LengthCounter, word_counter
from cwdpo.data.validate.report import LengthStats, ValidationReport
from cwdpo.errors import CwdpoError, DataError
from cwdpo.records import SAMPLING, Completion, Example, ImageRef, Place, VideoRef, VideoSampling

__all__ = ["ValidationReport", "validate"]

_PROGRESS_ROWS = 500


def validate(
    path: str | Path | Source,
    *,
    format: Spec = "auto",
    image_root: Path | None = None,
    default_prompt: str = "Describe the image.",
    captions_per_image: int = 1,
    ignore_columns: Collection[str] = (),
    check_images: CheckImages = "decode",
    against: Sequence[str | Path] = (),
    lengths: LengthCounter | None = None,
    max_length: int | None = None,
    fix: Path | None = None,
    video: VideoSampling = SAMPLING,
    progress: Callable[[int], None] = lambda rows: None,
) -> ValidationReport:
    """Read every row, decode every image once, and report all problems.

    Rows are streamed: memory grows by about 150 bytes per row, for digests of ids, texts and images.

    Args:
        path: the data set; this and the next six arguments are as in :func:`cwdpo.data.read.reader.read_examples`.
        image_root: folder that image paths are relative to, also those of ``against``.
        against: data sets that must not have an image of this one, in addition to the validation and test files next
            to a ``train`` file. A row with such an image, compared by its bytes, is bad.
        lengths: counts lengths; by default in words.
        max_length: a row with more tokens of prompt plus longest response is bad.
        fix: a new ``.jsonl`` file for the rows without problems.
        video: which frames of videos are kept; these are decoded, too.
        progress: called with the number of rows read, from time to time and at the end.

    Raises:
        DataError: there are no rows, the format is unknown, none of the first rows is an object, or ``fix`` cannot be
            written.
    """
    if max_length is not None and max_length < 1:
        raise DataError(f"max_length = {max_length}; allowed: 1 or more")
    source = path if isinstance(path, Source) else open_source(path)
    others = [*held_out_beside(source), *map(open_source, against)]
    counter = lengths or word_counter()
    stats, videos = ImageStats(), VideoStats()
    folder = ImageFolder(image_root or source.folder, check_images, stats.add, videos.add)
    options = ReadOptions(default_prompt, captions_per_image, frozenset(ignore_columns), video)
    parsed = ParsedRows(source, format, folder, options)
    report = ValidationReport(
        source.name,
        parsed.format.name,
        images=stats,
        videos=videos,
        lengths=LengthStats(counter.unit, max_length=max_length),
    )
    by_content = check_images in ("identify", "decode")
    checks = _Checks(report, counter, _Others(others, format, image_root, options), by_content)
    _check_rows(parsed, checks, report, fix, progress)
    report.unread, report.notes = parsed.unread, parsed.notes()
    report.good = report.rows - report.bad
    report.fixed = str(fix) if fix is not None and report.good else None
    return report


def _check_rows(
    parsed: ParsedRows,
    checks: _Checks,
    report: ValidationReport,
    fix: Path | None,
    progress: Callable[[int], None],
) -> None:
    """Count all rows and problems in the report; write the good rows to ``fix``."""
    log = ProblemLog()
    with good_rows(fix) if fix is not None else nullcontext() as writer:
        for row in parsed:
            problems = checks.problems(row)
            _count_row(report, row, problems)
            for problem in problems:
                log.add(problem)
            if writer is not None and not problems:
                writer.write(row.raw, row.pictures)
            if report.rows % _PROGRESS_ROWS == 0:
                progress(report.rows)
    progress(report.rows)
    report.problems = log.groups()


class _Checks:
    """Checks of rows in addition to reading them: repetitions, images in other sets, lengths."""

    def __init__(
        self,
        report: ValidationReport,
        counter: LengthCounter,
        others: _Others,
        by_content: bool,
    ) -> None:
        self._stats, self._counter = report.lengths, counter
        pictures = _Pictures(by_content=by_content)
        self._leaks = _Leaks(report, pictures, others)
        self._repeats = _Repeats(report, pictures)

    def problems(self, row: ParsedRow) -> list[Problem]:
        """The problems found while reading, and those of these checks."""
        found = []
        for example in row.examples:
            if not row.raw.again:  # a repetition set by a registry is not a problem
                found.append(self._repeats.add(example, row))
            found.append(self._leaks.find(example))
            found.append(_measure(self._stats, self._counter, example))
        more = [error.at(row.raw.file, row.raw.number) for error in found if error is not None]
        return [*row.problems, *more]


def _count_row(report: ValidationReport, row: ParsedRow, problems: Sequence[Problem]) -> None:
    report.rows += 1
    report.bad += bool(problems)
    report.columns.update(row.columns)
    for example in row.examples:
        before = report.examples
        report.examples += 1
        report.images_per_row[len(example.images)] += 1
        report.videos_per_row[len(example.videos)] += 1
        report.gentle_per_prompt[len(example.gentle)] += 1
        kinds = Counter(negative.kind or "unnamed" for negative in example.rejected)
        kinds["all"] = len(example.rejected)
        for kind in kinds.keys() | report.negatives_per_prompt.keys():
            # All earlier examples have 0 negatives of a kind that occurs for the first time.
            counts = report.negatives_per_prompt.setdefault(kind, Counter({0: before} if before else {}))
            counts[kinds[kind]] += 1


def _measure(stats: LengthStats, counter: LengthCounter, example: Example) -> RowError | None:
    """Count the lengths of an example; returns the problem if it cannot be encoded or is too long."""
    try:
        found = counter.of(example)
    except RefusedRowError as error:
        return RowError(error.kind, error.key, error.reason, error.remedy)
    except DataError as error:
        reason = str(error).removeprefix(f"{example.where}: ")
        return RowError("not-encodable", "", reason, "repair the row, or leave it out")
    stats.add_response("chosen", found.chosen)
    for length in found.negatives[: len(example.rejected)]:
        stats.add_response("rejected", length)
    stats.add_example(found.longest, example.where)
    if stats.max_length is None or found.longest <= stats.max_length:
        return None
    even = "" if stats.unit == "tokens" else ", even at one token per word"
    return RowError(
        "too-long",
        "",
        f"{found.longest} {stats.unit} (prompt {found.prompt}) are more than max_length = {stats.max_length}{even}",
        "raise data.max_length, shrink the images (model.processor_options), or leave the row out: nothing is "
        "truncated",
    )


class _Pictures:
    """8-byte digests of images and videos; each file is read once."""

    def __init__(self, *, by_content: bool) -> None:
        self._by_content = by_content
        self._of_path = DigestMap()

    def of(self, image: ImageRef | VideoRef) -> int:
        """Digest of the encoded bytes; if files are not opened (they may be missing), digest of the path.

        Raises:
            DataError: the file cannot be read.
        """
        if image.path is not None and not self._by_content:
            return digest8(bytes(image.path))
        if isinstance(image, VideoRef):
            return digest8(video_digest(image))
        if image.path is None:
            return digest8(image.stored())
        name = digest8(bytes(image.path))
        known = self._of_path.get(name)
        if known is None:
            try:
                known = digest8(image.stored())
            except OSError as error:
                raise DataError(
                    f"{image.path}: cannot be read ({error.strerror}); restore it or drop the row"
                ) from None
            self._of_path.add(name, known)
        return known


class _Repeats:
    """Finds examples that repeat an earlier one."""

    def __init__(self, report: ValidationReport, pictures: _Pictures) -> None:
        self.report, self._pictures = report, pictures
        self._said, self._whole = FirstPlaces(), FirstPlaces()

    def add(self, example: Example, row: ParsedRow) -> RowError | None:
        """Add an example; returns the problem if an earlier row is equal, including negatives."""
        place = row.raw.file, row.raw.number
        digest = blake2b(digest_size=8)
        media: tuple[ImageRef | VideoRef, ...] = (*example.images, *example.videos)
        for one in media:
            digest.update(self._pictures.of(one).to_bytes(8, "little"))
        said = [
            [m.role, *(p.value if isinstance(p, Place) else p for p in m.parts), m.more]
            for m in example.prompt
        ]
        digest.update(json.dumps([said, example.chosen.text]).encode())
        first = self._said.add(digest8(digest.digest()), *place)
        negatives = [[self._content(n) for n in side] for side in (example.rejected, example.gentle)]
        digest.update(json.dumps(negatives).encode())
        same = self._whole.add(digest8(digest.digest()), *place)
        if first is not None:
            self.report.duplicates += 1
            if len(self.report.first_duplicates) < SHOWN_ROWS:
                self.report.first_duplicates.append((first, example.where))
        if same is None or same == example.where:
            return None
        return RowError(
            "duplicate-row",
            "",
            f"the same images, videos, prompt, chosen and negatives as {same}",
            "keep one of them; a repeated row is trained on twice",
        )

    def _content(self, negative: Completion) -> Any:
        if negative.images is None:
            return negative.text
        return [negative.text, [[self._pictures.of(i), repr(i.edit)] for i in negative.images]]


class _Others:
    """The other data sets, and how their images are read."""

    def __init__(
        self, sources: Sequence[Source], format: Spec, image_root: Path | None, options: ReadOptions
    ) -> None:
        self.sources, self._format = sources, format
        self._image_root, self._options = image_root, options

    def images(self, source: Source) -> Iterator[tuple[ImageRef | VideoRef, str, int]]:
        """All images and videos of a data set that exist, with file and row; its problems are not reported here."""
        folder = ImageFolder(self._image_root or source.folder, "exists")
        try:
            rows = iter(ParsedRows(source, self._format, folder, self._options))
        except CwdpoError:  # these rows are not trained on, so only their image columns are needed
            for raw in source.rows():
                if isinstance(raw.value, dict):
                    row = Row(raw.value, raw.file, raw.number, folder, self._options)
                    with suppress(RowError):
                        row.images()
                        row.videos()
                    yield from ((image, raw.file, raw.number) for image in row.pictures.values())
            return
        for parsed in rows:
            yield from ((image, parsed.raw.file, parsed.raw.number) for image in parsed.pictures.values())


class _Leaks:
    """Finds images that are also in another data set."""

    def __init__(self, report: ValidationReport, pictures: _Pictures, others: _Others) -> None:
        self._pictures = pictures
        self._elsewhere = FirstPlaces()
        for other in others.sources:
            before = len(self._elsewhere)
            for image, file, row in others.images(other):
                with suppress(DataError):  # validating the other data set reports an unreadable image
                    self._elsewhere.add(pictures.of(image), file, row)
            report.against[other.name] = len(self._elsewhere) - before

    def find(self, example: Example) -> RowError | None:
        """The problem if an image of the example is in another data set."""
        media: dict[str, tuple[ImageRef | VideoRef, ...]] = {"image": example.images, "video": example.videos}
        for medium, own in media.items():
            for i, one in enumerate(own):
                other = self._elsewhere.find(self._pictures.of(one))
                if other is not None:
                    return RowError(
                        "leak",
                        f"{medium}s[{i}]",
                        f"the same {medium}, byte for byte, is in {other}",
                        "remove it from one of the sets, or leave out data.validation_path: then the split is by "
                        "image and video",
                    )
        return None
