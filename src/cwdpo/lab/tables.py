"""A study's tables in markdown, CSV and for the terminal; without times and paths, which differ between runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cwdpo.report.summary import Difference, Figure, Mean, Summary

COLUMNS = (
    "variant", "label", "figure", "better", "n", "failed", "mean", "low", "high",
    "against", "difference", "difference_low", "difference_high", "two_way_low", "two_way_high",
    "p", "p_corrected", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table: its kind, a note to show above it, column heads, and rows of text."""

    kind: Literal["means", "differences", "two-way", "panel", "slopes"]
    note: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(summary: Summary, *, main: bool = False) -> list[Table]:
    """Tables of means, of paired differences and, if the study has one, of the panel of scores.

    Args:
        summary: of the study.
        main: for a terminal, where space is limited: only main figures, and only differences of figures with a better
            direction; intervals are below the values, p-values are marks.
    """
    figures = [f for f in summary.figures if f.main or not main]
    base = [["starting model", *(number(summary.base.get(f.key), f.digits) for f in figures)]]
    rows = [[r.named, *(number(r.figures[f.key], f.digits) for f in figures)] for r in summary.variants]
    n, m = len(summary.seeds), len(summary.compared)
    made = [
        Table(
            "means",
            f"Mean over {n} seeds ± half of the 95% interval (win rate: by prompt).",
            ["variant", *(f.head for f in figures)],
            [*(base if summary.base else ()), *rows],
        )
    ]
    differing = [f for f in summary.differing if f in figures and not (main and f.better == "none")]
    differences = [
        [f"{r.label} {summary.minus(r)}".strip(), *(difference(r.against[f.key], f, short=main) for f in differing)]
        for r in summary.compared
    ]  # fmt: skip
    note = (
        f"Difference to {summary.row(summary.full).label} or the named variant, paired by seed, with its 95% interval. "
        f"p-values are corrected (Holm) for the {m} comparisons of a figure; * marks p < 0.05."
    )
    made.append(Table("differences", note, ["variant", *(f.head for f in differing)], differences))
    if not main:
        made += _two_way(summary)
    if summary.panel:
        scores = [
            [label, *("-" if name is None else number(summary.row(name).figures.get("score"), 3) for name in row)]
            for label, row in summary.panel.rows.items()
        ]  # fmt: skip
        made.append(
            Table("panel", "Score, mean ± half of the 95% interval:", ["", *summary.panel.columns], scores)
        )
        made += slopes(summary)
    return made


def slopes(summary: Summary) -> list[Table]:
    """The slopes of the score over the columns of a panel whose columns are numbers, if there is one."""
    panel = summary.panel
    if panel is None or not panel.slopes:
        return []
    figure = Figure("slope", "slope", "none", 3)
    rows = [
        [label, number(slope, 3), difference(panel.slope_differences[label], figure) if label in
         panel.slope_differences else "-"]
        for label, slope in panel.slopes.items()
    ]  # fmt: skip
    reference = next(label for label in panel.slopes if label not in panel.slope_differences)
    note = f"Slope of the score over the columns, by seed; p-values are corrected (Holm) for {len(rows) - 1}."
    return [Table("slopes", note, ["", "slope", f"minus {reference}"], rows)]


def _two_way(summary: Summary) -> list[Table]:
    """The same differences with intervals over seeds and images, for figures that have them."""
    known = [
        f for f in summary.differing if any(r.against[f.key].two_way is not None for r in summary.compared)
    ]
    rows = []
    for r in summary.compared:
        cells = []
        for f in known:
            one = r.against[f.key]
            low, high = one.two_way or (None, None)
            cells.append(difference(replace(one, low=low, high=high, p_corrected=None), f))
        rows.append([f"{r.label} {summary.minus(r)}".strip(), *cells])
    note = (
        "The same differences with 95% intervals over seeds and test images (bootstrap): they also cover the choice "
        "of test images."
    )
    return [Table("two-way", note, ["variant", *(f.head for f in known)], rows)] if known and rows else []


def markdown(summary: Summary) -> str:
    """All tables as markdown, each number with its interval."""
    lines = [f"## {summary.title}", ""]
    lines += [summary.question, ""] if summary.question else []
    for table in tables(summary):
        lines += [to_markdown(table), ""]
    if summary.failures:
        lines += [
            f"**{len(summary.failures)} cells failed:**",
            "",
            *(f"- {line}" for line in summary.failures),
            "",
        ]
    return "\n".join(lines)


def to_markdown(table: Table) -> str:
    """A table with its note above it."""
    return "\n".join(
        [table.note, "", _line(table.heads), "|---" * len(table.heads) + "|", *map(_line, table.rows)]
    )


def show(summary: Summary) -> None:
    """Print the main figures in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Drawn

    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"[bold]{escape(summary.title)}[/bold]\n{escape(summary.question)}")
    for table in tables(summary, main=True):
        drawn = Drawn(escape(table.heads[0]), box=box.SIMPLE_HEAD)
        for head in table.heads[1:]:
            drawn.add_column(escape(head), justify="right")
        for row in table.rows:
            drawn.add_row(*map(escape, row))
        console.print(f"\n{escape(table.note)}", drawn)
    for line in summary.failures:
        console.print(f"FAILED {line}", markup=False)
    console.print(f"Held-out probes: {summary.provenance['probes']}.", markup=False)


def to_csv(summary: Summary) -> str:
    """One line per variant and figure, with full precision; a missing value is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in summary.variants:
        for figure in summary.figures:
            value, one = row.figures[figure.key], row.against.get(figure.key)
            line = {
                "variant": row.name, "label": row.label, "figure": figure.key, "better": figure.better,
                "n": value.n, "failed": len(row.failed), "mean": value.mean, "low": value.low, "high": value.high,
                "against": row.rival,
            }  # fmt: skip
            if one is not None:
                line |= {
                    "difference": one.mean, "difference_low": one.low, "difference_high": one.high, "p": one.p,
                    "p_corrected": one.p_corrected, "verdict": one.word,
                }  # fmt: skip
                if one.two_way is not None:
                    line |= {"two_way_low": one.two_way[0], "two_way_high": one.two_way[1]}
            writer.writerow(line)
    return text.getvalue()


def number(value: Mean | None, digits: int) -> str:
    """Mean and half-width of the interval."""
    if value is None or value.mean is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ±{(value.high - value.low) / 2:.{digits}f}"


def difference(one: Difference, figure: Figure, *, short: bool = False) -> str:
    """A paired difference with its interval, its corrected p-value, and a mark if that is below 0.05."""
    if one.mean is None:
        return "-"
    digits, p = figure.digits, one.p_corrected
    mean, mark = f"{one.mean:+.{digits}f}", "*" if p is not None and p < 0.05 else ""
    interval = "" if one.low is None else f"[{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
    if short:
        return f"{mean}{mark}\n{interval}"
    return " ".join(filter(None, (mean, interval, "" if p is None else f"p={p:.3f}"))) + mark


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"
