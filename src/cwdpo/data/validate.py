"""A report on a data set before any model is loaded: what was understood, what is odd, what to repair."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cwdpo.data.images import CheckImages, ImageDigests, ImageFacts, ImageFolder
from cwdpo.data.problems import SHOWN_ROWS, ProblemGroup, ProblemLog, join_groups
from cwdpo.data.read import ParsedRow, parse_rows
from cwdpo.data.rowparts import ReadOptions
from cwdpo.data.rows import open_source
from cwdpo.records import Completion, Example

_WORD_EDGES = (1, 5, 10, 20, 50, 100, 200, 500)  # lower edges, in words


@dataclass
class ImageStats:
    """Sizes in pixels and stored colour modes of the images whose header was read, each file once."""

    n: int = 0
    width: tuple[int, int] | None = None
    height: tuple[int, int] | None = None
    modes: Counter[str] = field(default_factory=Counter)

    def add(self, facts: ImageFacts) -> None:
        """Count one image."""
        self.n += 1
        self.modes[facts.mode] += 1
        self.width = _widen(self.width, facts.width)
        self.height = _widen(self.height, facts.height)


def _widen(span: tuple[int, int] | None, value: int) -> tuple[int, int]:
    return (value, value) if span is None else (min(span[0], value), max(span[1], value))


@dataclass
class ValidationReport:
    """What a data set holds. Histograms map a value (or a bucket of words) to a count of examples.

    ``bad`` counts rows with at least one problem, ``good`` the others; ``columns`` counts the rows in which
    each column is not null. ``negatives_per_prompt`` maps a kind (``all`` for every kind together,
    ``unnamed`` for none) to {number of negatives: examples}. ``duplicates`` counts the examples whose images,
    prompt and chosen response equal those of an earlier one; ``first_duplicates`` names the first pairs.
    """

    path: str
    format: str
    rows: int = 0
    good: int = 0
    bad: int = 0
    examples: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    negatives_per_prompt: dict[str, Counter[int]] = field(default_factory=dict)
    gentle_per_prompt: Counter[int] = field(default_factory=Counter)
    images_per_row: Counter[int] = field(default_factory=Counter)
    images: ImageStats = field(default_factory=ImageStats)
    response_words: dict[str, Counter[str]] = field(default_factory=dict)
    duplicates: int = 0
    first_duplicates: list[tuple[str, str]] = field(default_factory=list)
    problems: list[ProblemGroup] = field(default_factory=list)

    @property
    def bad_fraction(self) -> float | None:
        """Share of bad rows, to compare with ``data.max_bad_fraction``; ``None`` without rows."""
        return self.bad / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; counts are ordered by value."""
        return {
            "path": self.path,
            "format": self.format,
            "rows": self.rows,
            "good": self.good,
            "bad": self.bad,
            "bad_fraction": self.bad_fraction,
            "examples": self.examples,
            "columns": _ordered(self.columns),
            "negatives_per_prompt": {k: _ordered(v) for k, v in sorted(self.negatives_per_prompt.items())},
            "gentle_per_prompt": _ordered(self.gentle_per_prompt),
            "images_per_row": _ordered(self.images_per_row),
            "images": {
                "n": self.images.n,
                "width": self.images.width,
                "height": self.images.height,
                "modes": _ordered(self.images.modes),
            },
            "response_words": {k: _buckets(v) for k, v in self.response_words.items()},
            "duplicates": self.duplicates,
            "first_duplicates": self.first_duplicates,
            "problems": [group.to_dict() for group in self.problems],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_text(self) -> str:
        """A plain text report for the terminal, without markup."""
        share = "" if self.bad_fraction is None else f" ({self.bad_fraction:.1%})"
        lines = [
            f"{self.path}: format {self.format}",
            f"rows {self.rows}: {self.good} good, {self.bad} bad{share}; {self.examples} examples",
            f"columns: {_counts(self.columns)}",
            f"images per example: {_counts(self.images_per_row)}",
        ]
        if self.images.width and self.images.height:
            (w0, w1), (h0, h1) = self.images.width, self.images.height
            lines.append(
                f"images read: {self.images.n}; {w0} to {w1} wide, {h0} to {h1} high (pixels); "
                f"{_counts(self.images.modes)}"
            )
        for kind, counts in sorted(self.negatives_per_prompt.items()):
            lines.append(f"negatives per example, {kind}: {_counts(counts)}")
        lines.append(f"gentle negatives per example: {_counts(self.gentle_per_prompt)}")
        for side, counted in self.response_words.items():
            shown = ", ".join(f"{bucket}: {n}" for bucket, n in _buckets(counted).items())
            lines.append(f"words in {side}: {shown}")
        lines.append(f"duplicates (same images, prompt and chosen): {self.duplicates}")
        lines += [f"    {again} repeats {first}" for first, again in self.first_duplicates]
        lines.append(f"problems:\n{join_groups(self.problems)}" if self.problems else "problems: none")
        return "\n".join(lines)


def _ordered(counts: Counter[Any]) -> dict[str, int]:
    return {str(key): counts[key] for key in sorted(counts)}


def _counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{key}: {n}" for key, n in _ordered(counts).items()) or "none"


def _bucket(words: int) -> str:
    """The half-open bucket of a word count: ``1-4``, ``5-9``, ..., ``500+``."""
    below = [edge for edge in _WORD_EDGES if edge <= words] or [_WORD_EDGES[0]]
    above = [edge for edge in _WORD_EDGES if edge > max(words, _WORD_EDGES[0])]
    return f"{below[-1]}-{above[0] - 1}" if above else f"{below[-1]}+"


def _buckets(counts: Counter[str]) -> dict[str, int]:
    return {b: counts[b] for b in (_bucket(edge) for edge in _WORD_EDGES) if counts[b]}


def validate(
    path: str | Path,
    *,
    format: str = "auto",
    image_root: Path | None = None,
    default_prompt: str = "Describe the image.",
    captions_per_image: int = 1,
    check_images: CheckImages = "decode",
) -> ValidationReport:
    """Read every row, decode every image once, and report. Streaming: memory grows with ids and hashes only.

    Arguments as for :func:`cwdpo.data.read.read_examples`. Bad rows are reported, however many.

    Raises:
        DataError: nothing to read, an unknown format, or none of the first rows is an object.
    """
    source = open_source(path)
    stats = ImageStats()
    folder = ImageFolder(image_root or source.folder, check_images, stats.add)
    form, parsed = parse_rows(source, format, folder, ReadOptions(default_prompt, captions_per_image))
    report = ValidationReport(source.name, form.name, images=stats)
    log = ProblemLog()
    repeats = _Repeats(report, by_content=check_images in ("identify", "decode"))
    for row in parsed:
        _count_row(report, row)
        for example in row.examples:
            repeats.add(example)
        for problem in row.problems:
            log.add(problem)
    report.good = report.rows - report.bad
    report.problems = log.groups()
    return report


def _count_row(report: ValidationReport, row: ParsedRow) -> None:
    report.rows += 1
    report.bad += bool(row.problems)
    report.columns.update(row.columns)
    for example in row.examples:
        before = report.examples
        report.examples += 1
        report.images_per_row[len(example.images)] += 1
        report.gentle_per_prompt[len(example.gentle)] += 1
        kinds = Counter(negative.kind or "unnamed" for negative in example.rejected)
        kinds["all"] = len(example.rejected)
        for kind in kinds.keys() | report.negatives_per_prompt.keys():
            # A kind met for the first time was absent from every example before.
            counts = report.negatives_per_prompt.setdefault(kind, Counter({0: before} if before else {}))
            counts[kinds[kind]] += 1
        _count_words(report, "chosen", [example.chosen])
        _count_words(report, "rejected", example.rejected)


def _count_words(report: ValidationReport, side: str, responses: Iterable[Completion]) -> None:
    for response in responses:
        report.response_words.setdefault(side, Counter())[_bucket(len(response.text.split()))] += 1


class _Repeats:
    """Finds examples that say again what an earlier one said, by hashes of 16 bytes."""

    def __init__(self, report: ValidationReport, *, by_content: bool) -> None:
        self.report, self.by_content = report, by_content
        self._digests = ImageDigests()
        self._first: dict[bytes, str] = {}

    def add(self, example: Example) -> None:
        digest = blake2b(digest_size=16)
        for image in example.images:
            # Files that were not looked into may be missing: their paths must do.
            use_path = image.path is not None and not self.by_content
            digest.update(str(image.path).encode() if use_path else self._digests.of(image))
        said = [[m.role, *m.parts] for m in example.prompt]
        digest.update(json.dumps([said, example.chosen.text]).encode())
        key = digest.digest()
        if key not in self._first:
            self._first[key] = example.where
            return
        self.report.duplicates += 1
        if len(self.report.first_duplicates) < SHOWN_ROWS:
            self.report.first_duplicates.append((self._first[key], example.where))
