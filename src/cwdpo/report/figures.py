"""Small charts as SVG text for an HTML page with a light and a dark theme.

Matplotlib draws with placeholder colours, which are then replaced by CSS variables (``--ink``, ``--muted``, ``--grid``,
``--bad``, ``--c0`` to ``--c7``), so the same SVG works in both themes. No text from data is drawn into a chart: titles
and legends are HTML, which is escaped and wrapped. Identifiers get the chart's key as a prefix, and unused ones are
removed, so that the charts of a page do not collide.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SLOTS = 8
"""Number of colours; a ninth line has the first colour again, with another dash pattern."""
DASHES = ("", "6 2.5", "2 2", "8 2.5 2 2.5", "4 2", "3 1.5", "10 3", "6 2 1 2 1 2")
"""SVG dash patterns by slot, so that lines can be distinguished without colours."""

_INK, _MUTED, _GRID, _BAD = "#fd0001", "#fd0002", "#fd0003", "#fd0004"
_THEME = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)", _BAD: "var(--bad)"}
_SIZE = (4.6, 2.5)  # inches of 72 units: about the width of a column, so that the text is not scaled
_FEW = 12  # lines with at most this many points have markers
_RC = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _GRID,
    "ytick.labelcolor": _MUTED,
    "ytick.left": False,
    "lines.scale_dashes": False,
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: name for the legend (plain text; never drawn).
        slot: decides colour and dash pattern.
        x, y: finite numbers, the same number of each.
        low, high: the band around ``y``, or empty.
    """

    label: str
    slot: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def colour(slot: int) -> str:
    """The CSS colour of a slot."""
    return f"var(--c{slot % SLOTS})"


def dash(slot: int) -> str:
    """The SVG dash pattern of a slot; empty for a solid line."""
    return DASHES[(slot + slot // SLOTS) % len(DASHES)]


def line_chart(key: str, lines: Sequence[Line], *, whole: bool = False, limit: float | None = None) -> str:
    """Lines with their bands over steps.

    Args:
        key: unique on the page.
        lines: at least one.
        whole: show the range from 0 to 1, so that small changes look small.
        limit: a value to mark with a horizontal line.

    Returns:
        An ``<svg>`` element.
    """

    def paint(axes: Any) -> None:
        for line in reversed(lines):  # draw the first line last, so that it is on top
            if len(line.low):
                axes.fill_between(
                    line.x, line.low, line.high, color=_tone(line.slot), alpha=0.16, linewidth=0
                )
            axes.plot(
                line.x, line.y, color=_tone(line.slot), linestyle=_style(line.slot), linewidth=1.7,
                marker="o" if len(line.x) <= _FEW else "", markersize=3,
            )  # fmt: skip
        axes.set_xlabel("step")
        if limit is not None:
            axes.axhline(limit, color=_BAD, linewidth=1.1, linestyle=(0, (1, 2)))
        if whole:
            axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=_MUTED, linewidth=0.8)

    return _drawn(key, paint)


def histogram(key: str, values: Sequence[float], marks: Sequence[tuple[float, int]], x_label: str) -> str:
    """Counts of ``values`` with vertical lines.

    Args:
        key: unique on the page.
        values: at least one number.
        marks: (position, slot) of each vertical line.
        x_label: the unit of the values.
    """

    def paint(axes: Any) -> None:
        axes.hist(
            values, bins=min(30, max(5, round(len(values) ** 0.5))), color=_MUTED, alpha=0.55, linewidth=0
        )
        for position, slot in marks:
            axes.axvline(position, color=_tone(slot), linestyle=_style(slot), linewidth=1.8)
        axes.set_xlabel(x_label)
        axes.set_ylabel("samples")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _drawn(key, paint)


def reliability_chart(key: str, lines: Sequence[Line], *, gap: bool) -> str:
    """Accuracy over confidence; the diagonal is perfect calibration.

    Args:
        key: unique on the page.
        lines: ``x`` is confidence and ``y`` is accuracy, both probabilities.
        gap: ``y`` is accuracy minus confidence instead, which makes small differences visible.
    """

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 0 if gap else 1], color=_MUTED, linewidth=0.9)
        for line in reversed(lines):
            axes.plot(
                line.x, line.y, color=_tone(line.slot), linestyle=_style(line.slot), linewidth=1.5,
                marker="o", markersize=3.2,
            )  # fmt: skip
        axes.set(xlim=(0, 1.02), xlabel="confidence of the top token")
        if not gap:
            axes.set(ylim=(0, 1.02))

    return _drawn(key, paint, (4.6, 3.2))


def slope_chart(key: str, lines: Sequence[Line], ends: tuple[str, str]) -> str:
    """Two columns connected by one line per method, with intervals if there are any.

    Args:
        key: unique on the page.
        lines: ``y`` (and ``low``, ``high``) at two points; ``x`` is not used.
        ends: names of the two columns.
    """

    def paint(axes: Any) -> None:
        for i, line in enumerate(lines):
            shift = (i - (len(lines) - 1) / 2) * 0.035  # side by side, so that the intervals do not overlap
            x = (shift, 1 + shift)
            if len(line.low):
                axes.vlines(x, line.low, line.high, color=_tone(line.slot), alpha=0.55, linewidth=1.4)
            axes.plot(
                x, line.y, color=_tone(line.slot), linestyle=_style(line.slot), linewidth=1.7,
                marker="o", markersize=4.2,
            )  # fmt: skip
        axes.set_xticks([0, 1], labels=ends)
        axes.set_xlim(-0.25, 1.25)
        axes.yaxis.set_major_locator(MaxNLocator(5))

    return _drawn(key, paint)


def _tone(slot: int) -> str:
    return f"#fe00{slot % SLOTS:02x}"


def _style(slot: int) -> Any:
    pattern = dash(slot)
    return (0, tuple(float(part) for part in pattern.split())) if pattern else "-"


def _drawn(key: str, paint: Callable[[Any], None], size: tuple[float, float] = _SIZE) -> str:
    with mpl.rc_context({**_RC, "svg.hashsalt": key}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        paint(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(out.getvalue(), key)


def _for_page(svg: str, key: str) -> str:
    """Remove what a page does not need, insert the theme's colours, and prefix identifiers with the chart's key."""
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)  # its `*` rule would apply to the whole page
    body = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', body, count=1
    )
    body = re.sub(r"font-family: [^;\"]*(&quot;[^;\"]*)*; ?", "", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0]), body)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", body)
    return re.sub(r"\s*\n\s*", " ", _coloured(body, _THEME))


def _coloured(body: str, theme: Mapping[str, str]) -> str:
    every = {**theme, **{_tone(slot): colour(slot) for slot in range(SLOTS)}}
    return re.sub(r"#f[de]00[0-9a-f]{2}", lambda m: every[m[0]], body)
