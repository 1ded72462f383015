"""Tables of numbers with intervals, and what a page of tables has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.report._page import Legend, Panel
from cwdpo.report._text import MISSING, finite, number

_TONES = {"better": "good", "worse": "bad", "failed": "bad"}


@dataclass(frozen=True)
class Entry:
    """One cell: its text, small lines below it, its tone (``good``, ``bad`` or none), and the exact number."""

    text: str
    below: tuple[str, ...] = ()
    tone: str = ""
    value: str = ""


@dataclass(frozen=True)
class Table:
    """A section of the page: anchor, title, note, column heads (text, help) and rows; ``folded``: opens on a click.

    ``groups``: titles above the columns, each with its number of columns; none: no such line.
    """

    key: str
    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str, Sequence[Entry]]]
    folded: bool = False
    groups: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Charts:
    """A section of charts with one legend; the charts in ``more`` open on a click."""

    key: str
    title: str
    note: str
    legend: Sequence[Legend]
    panels: Sequence[Panel]
    more: Sequence[Panel] = ()


@dataclass(frozen=True)
class Page:
    """The values for the template of tables.

    Attributes:
        notes: what was compared.
        status: how far the comparison is; empty at its end.
        levels, head: who is better at what, and how surely, and the table of the most important figures.
        look: the images and captions at the top, and ``looked``, how they were chosen.
        gallery: further ones.
    """

    kind: str
    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    settings: Sequence[tuple[str, str]]
    provenance: Mapping[str, Any]
    failures: Sequence[str] = ()
    charts: Sequence[Charts] = ()
    gallery: Sequence[Any] = ()
    status: str = ""
    levels: Sequence[Any] = ()
    head: Table | None = None
    against: str = ""
    look: Sequence[Any] = ()
    looked: str = ""


def mean_entry(value: Any, low: Any, high: Any, digits: int, notes: tuple[str, ...] = ()) -> Entry:
    """A cell with a number and its interval below."""
    if finite(value) is None:
        return Entry(MISSING, notes)
    bounds = (interval(low, high, digits),) if finite(low) is not None else ()
    return Entry(number(value, digits), (*bounds, *notes), value=repr(value))


def difference_entry(
    value: float | None, low: float | None, high: float | None, p: float | None, word: str, digits: int
) -> Entry:
    """A cell with a paired difference, its interval, its corrected p-value, and the conclusion if it is clear."""
    if value is None:
        return Entry(MISSING)
    below = [interval(low, high, digits)] if low is not None else []
    if p is not None:
        below.append("p < 0.001" if p < 0.001 else f"p = {p:.3f}")
    tone = _TONES.get(word, "")
    if tone:
        below.append(word)
    text = number(value, digits)
    return Entry(("+" if value > 0 and text.strip("0.") else "") + text, tuple(below), tone)


def interval(low: Any, high: Any, digits: int) -> str:
    """Both bounds as a text."""
    return f"{number(low, digits)} to {number(high, digits)}"
