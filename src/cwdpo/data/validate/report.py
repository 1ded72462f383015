"""The report of a validation: counts of a data set, as JSON and as text."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cwdpo.data.facts import ImageStats, VideoStats, counted, ordered
from cwdpo.data.problems import ProblemGroup, join_groups, printable

_EDGES = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)  # lower edges, in words or tokens


@dataclass
class LengthStats:
    """Histograms of lengths in ``unit``; ``examples`` counts prompt plus longest response.

    ``over`` counts the examples longer than ``max_length`` (tokens); if the unit is words, it is a lower bound.
    """

    unit: str = "words"
    responses: dict[str, Counter[str]] = field(default_factory=dict)
    examples: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    longest_where: str = ""
    max_length: int | None = None
    over: int = 0

    def add_response(self, side: str, length: int) -> None:
        """Count one response of a side (``chosen`` or ``rejected``)."""
        self.responses.setdefault(side, Counter())[_bucket(length)] += 1

    def add_example(self, length: int, where: str) -> None:
        """Count one example; ``where`` is kept for the longest."""
        self.examples[_bucket(length)] += 1
        if length > self.longest:
            self.longest, self.longest_where = length, where
        self.over += self.max_length is not None and length > self.max_length

    def to_dict(self) -> dict[str, Any]:
        """The histograms as JSON."""
        return {
            "unit": self.unit,
            "responses": {side: _buckets(counts) for side, counts in self.responses.items()},
            "examples": _buckets(self.examples),
            "longest": self.longest,
            "longest_where": self.longest_where,
            "max_length": self.max_length,
            "over_max_length": self.over,
        }

    def lines(self) -> list[str]:
        """The histograms as text; empty if nothing was counted."""
        if not self.examples:
            return []
        sides = {**self.responses, "prompt + longest response": self.examples}
        lines = [f"{self.unit} in {side}: {_shown(counts)}" for side, counts in sides.items()]
        lines.append(f"    longest: {self.longest} ({self.longest_where})")
        if self.max_length is not None:
            least = " or more (one token per word is the least)" if self.unit == "words" else ""
            lines.append(f"    over max_length {self.max_length}: {self.over}{least}")
        return lines


@dataclass
class ValidationReport:
    """Counts of a data set. A histogram maps a value (or a bucket of lengths) to a number of examples.

    Attributes:
        bad, good: rows with and without problems.
        columns: for each column, the rows in which it is not null.
        unread: for each column that the format does not read, the rows in which it has a value.
        notes: further lines for the user.
        negatives_per_prompt: for each kind of negative (``all``: all kinds together, ``unnamed``: no kind), a histogram
            of the number of negatives.
        duplicates: examples with the same images, prompt and chosen response as an earlier one. This is allowed for
            several negatives; if the negatives are also the same, the row is a problem.
        first_duplicates: the first pairs of them.
        against: for each data set compared with, the number of its images.
        fixed: the file of good rows, if one was written.
    """

    path: str
    format: str
    rows: int = 0
    good: int = 0
    bad: int = 0
    examples: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    negatives_per_prompt: dict[str, Counter[int]] = field(default_factory=dict)
    gentle_per_prompt: Counter[int] = field(default_factory=Counter)
    images_per_row: Counter[int] = field(default_factory=Counter)
    images: ImageStats = field(default_factory=ImageStats)
    videos_per_row: Counter[int] = field(default_factory=Counter)
    videos: VideoStats = field(default_factory=VideoStats)
    lengths: LengthStats = field(default_factory=LengthStats)
    duplicates: int = 0
    first_duplicates: list[tuple[str, str]] = field(default_factory=list)
    against: dict[str, int] = field(default_factory=dict)
    problems: list[ProblemGroup] = field(default_factory=list)
    fixed: str | None = None

    @property
    def bad_fraction(self) -> float | None:
        """Share of bad rows, which ``data.max_bad_fraction`` limits; ``None`` if there are no rows."""
        return self.bad / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON; counts are sorted by value."""
        return {
            "path": self.path,
            "format": self.format,
            "rows": self.rows,
            "good": self.good,
            "bad": self.bad,
            "bad_fraction": self.bad_fraction,
            "examples": self.examples,
            "columns": ordered(self.columns),
            "unread": ordered(self.unread),
            "notes": self.notes,
            "negatives_per_prompt": {k: ordered(v) for k, v in sorted(self.negatives_per_prompt.items())},
            "gentle_per_prompt": ordered(self.gentle_per_prompt),
            "images_per_row": ordered(self.images_per_row),
            "images": self.images.to_dict(),
            "videos_per_row": ordered(self.videos_per_row),
            "videos": self.videos.to_dict(),
            "lengths": self.lengths.to_dict(),
            "duplicates": self.duplicates,
            "first_duplicates": self.first_duplicates,
            "against": self.against,
            "problems": [group.to_dict() for group in self.problems],
            "fixed": self.fixed,
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
            f"columns: {counted(self.columns)}",
            *self.notes,
            f"images per example: {counted(self.images_per_row)}",
            *self.images.lines(),
            *([f"videos per example: {counted(self.videos_per_row)}"] if any(self.videos_per_row) else []),
            *self.videos.lines(),
        ]
        for kind, counts in sorted(self.negatives_per_prompt.items()):
            lines.append(f"negatives per example, {kind}: {counted(counts)}")
        lines.append(f"gentle negatives per example: {counted(self.gentle_per_prompt)}")
        lines += self.lengths.lines()
        lines.append(f"the same images, prompt and chosen again: {self.duplicates}")
        lines += [f"    {again} repeats {first}" for first, again in self.first_duplicates]
        lines += [f"compared with {name}: {n} images" for name, n in self.against.items()]
        lines.append(f"problems:\n{join_groups(self.problems)}" if self.problems else "problems: none")
        if self.fixed is not None:
            lines.append(f"good rows: {self.good} in {self.fixed}")
        return printable("\n".join(lines))


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{bucket}: {n}" for bucket, n in _buckets(counts).items())


def _bucket(length: int) -> str:
    """The half-open bucket of a length: ``0``, ``1-4``, ``5-9``, ..., ``10000+``."""
    if length < _EDGES[0]:
        return "0"
    below = [edge for edge in _EDGES if edge <= length]
    above = [edge for edge in _EDGES if edge > length]
    return f"{below[-1]}-{above[0] - 1}" if above else f"{below[-1]}+"


def _buckets(counts: Counter[str]) -> dict[str, int]:
    return {b: counts[b] for b in (_bucket(edge) for edge in (0, *_EDGES)) if counts[b]}
