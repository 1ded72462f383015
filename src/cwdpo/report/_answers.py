"""The top of the page of a study or a comparison: who is better at what, and how surely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.report._page import mapping, records
from cwdpo.report._tables import Entry, Table, interval
from cwdpo.report._text import finite, number
from cwdpo.report.summary import Difference, Figure, Mean, Row, Summary

MOST = 3
"""Number of lines of a level; of further ones only the number is shown."""
MOST_COLUMNS = 3
"""Largest number of columns of a panel that are compared at the top."""


@dataclass(frozen=True)
class Level:
    """What is known with the same certainty: a title, its tone (``good`` or none), and a line for each difference."""

    title: str
    lines: Sequence[str]
    tone: str = ""


@dataclass(frozen=True)
class _Found:
    """A difference in words; ``size``: its share of the range of the figure's means."""

    text: str
    size: float


def study_levels(summary: Summary) -> list[Level]:
    """The differences of the figures in ``head``: certain ones, ones of the same sign in every seed, and the others."""
    certain: list[_Found] = []
    steady: list[_Found] = []
    known = 0
    for figure in head(summary):
        for row in summary.compared:
            one, rival = row.against[figure.key], summary.row(str(row.rival))
            if one.mean is None or one.n < 2:
                continue
            known += 1
            found = _Found(_sentence(row, rival, figure, one), size(one, figure, summary))
            if one.word in ("better", "worse"):
                certain.append(found)
            elif same_sign(row.figures[figure.key], rival.figures[figure.key]):
                steady.append(found)
    if not known:
        return []
    rest = known - len(certain) - len(steady)
    seeds = len(summary.seeds)
    every = "both" if seeds == 2 else f"all {seeds}"
    return _levels(
        certain, steady, f"In {every} seeds, but not certain: with so few it may be chance",
        f"{rest} of {known} comparisons: no difference that has the same sign in every seed.",
    )  # fmt: skip


def comparison_levels(summary: Mapping[str, Any]) -> list[Level]:
    """The differences of a comparison of runs: certain ones, and how many others there are."""
    figures = {str(f.get("key")): f for f in records(summary.get("figures"))}
    certain: list[_Found] = []
    known = 0
    for pair in records(summary.get("differences")):
        for key, value in mapping(pair.get("figures")).items():
            one, figure = mapping(value), figures.get(key)
            mean, word = finite(one.get("value")), one.get("word")
            if figure is None or mean is None:
                continue
            known += 1
            if word in ("better", "worse"):
                digits = int(figure.get("digits") or 0)
                text = f"{figure.get('label') or key}: {pair.get('ours')} {word} than {pair.get('theirs')}, "
                text += _signed(mean, digits)
                if finite(one.get("low")) is not None:
                    text += f" ({interval(one.get('low'), one.get('high'), digits)})"
                certain.append(_Found(text, 0.0))
    if not known:
        return []
    return _levels(certain, [], "", f"{known - len(certain)} of {known} comparisons.")


def _levels(certain: list[_Found], steady: list[_Found], steadily: str, rest: str) -> list[Level]:
    levels = [Level("Certain (p < 0.05 after correction)", _lines(certain) or ["nothing"], "good")]
    if steady:
        levels.append(Level(steadily, _lines(steady)))
    return [*levels, Level("Not told apart", [rest])]


def _lines(found: Iterable[_Found]) -> list[str]:
    """A line for each difference, the largest first."""
    ordered = sorted(found, key=lambda one: -one.size)
    lines = [one.text for one in ordered[:MOST]]
    return lines + ([f"and {len(ordered) - MOST} more, in the tables below"] if len(ordered) > MOST else [])


def _sentence(row: Row, rival: Row, figure: Figure, one: Difference) -> str:
    """The better one first, each with its mean."""
    assert one.mean is not None
    better = (one.mean > 0) == (figure.better == "higher")
    first, second = (row, rival) if better else (rival, row)
    ours, theirs = (f"{r.label} {number(r.figures[figure.key].mean, figure.digits)}" for r in (first, second))
    p = "" if one.p_corrected is None else f", p {_p(one.p_corrected)}"
    return f"{figure.label}: {ours} better than {theirs}{p}"


def size(one: Difference, figure: Figure, summary: Summary) -> float:
    """A difference as a share of the range of the figure's means over the variants."""
    means = [m for row in summary.variants if (m := row.figures[figure.key].mean) is not None]
    spread = max(means) - min(means)
    return abs(one.mean or 0.0) / spread if spread else 0.0


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def _signed(value: float, digits: int) -> str:
    return ("+" if value > 0 else "") + number(value, digits)


def head(summary: Summary) -> list[Figure]:
    """The figures that the top of the page compares: those of ``head`` for which a direction is better."""
    named = {f.key: f for f in summary.differing if f.better != "none"}
    return [named[key] for key in summary.head if key in named]


def same_sign(ours: Mean, theirs: Mean) -> bool:
    """Whether the difference has the same sign in every seed, of two or more, and is 0 in none."""
    pairs = zip(ours.per_seed, theirs.per_seed, strict=True)
    signs = {(a > b) - (a < b) for a, b in pairs if a is not None and b is not None}
    return len(signs) == 1 and 0 not in signs


def head_table(summary: Summary) -> Table | None:
    """The figures of ``head`` for each row and column of a panel, first the column in which they differ most.

    ``None`` without a panel, or with a wide one.
    """
    figures, places = head(summary), summary.panel
    if places is None or not figures or len(places.columns) > MOST_COLUMNS:
        return None
    made = {
        label: [[_entry(None if n is None else summary.row(n), f, summary) for f in figures] for n in names]
        for label, names in places.rows.items()
    }

    def differing(column: int) -> float:
        """The sizes of the differences of a column that are certain, or have the same sign in every seed."""
        rows = [summary.row(name) for names in places.rows.values() if (name := names[column]) is not None]
        known = [(row, figure, row.against.get(figure.key)) for row in rows for figure in figures]
        return sum(
            size(one, figure, summary)
            for row, figure, one in known
            if one and _entry(row, figure, summary).below
        )

    order = sorted(range(len(places.columns)), key=differing, reverse=True)
    heads = [
        (figure.head.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓"), figure.help) for figure in figures
    ]
    return Table(
        "head", "", "", heads * len(order),
        [(label, "", [entry for i in order for entry in columns[i]]) for label, columns in made.items()],
        groups=[(places.columns[i], len(figures)) for i in order],
    )  # fmt: skip


def _entry(row: Row | None, figure: Figure, summary: Summary) -> Entry:
    if row is None:
        return Entry("–")
    value = row.figures[figure.key]
    if value.mean is None:
        return Entry("…" if any(c.status == "waiting" for c in row.cells) else "–")
    text = number(value.mean, figure.digits)
    one = row.against.get(figure.key)
    if one is None or row.rival is None:
        return Entry(text)
    if one.word in ("better", "worse"):
        return Entry(text, (f"{one.word}, certain",), {"better": "good", "worse": "bad"}[one.word])
    rival = summary.row(row.rival).figures[figure.key]
    if one.mean is None or one.n < 2 or not same_sign(value, rival):
        return Entry(text)
    word = "better" if (one.mean > 0) == (figure.better == "higher") else "worse"
    return Entry(text, (f"{word}, {one.n}/{one.n}",))
