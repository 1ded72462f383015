"""A panel of scores in rows and columns, and the slopes of the rows if the columns are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cwdpo.evaluation.intervals import mean_interval
from cwdpo.evaluation.paired import conclusion, holm, paired_difference
from cwdpo.lab.spec import Study
from cwdpo.report.summary import Difference, Mean, Panel, Row


def panel_of(study: Study, rows: Sequence[Row]) -> Panel | None:
    """The panel of the variants that have a cell in it, with slopes if the columns are numbers; else ``None``."""
    placed = {v.cell: name for name, v in study.variants.items() if v.cell}
    if not placed:
        return None
    names, columns = (tuple(dict.fromkeys(cell[side] for cell in placed)) for side in (0, 1))
    panel = Panel(columns, {name: tuple(placed.get((name, column)) for column in columns) for name in names})
    return _with_slopes(panel, rows, study.full)


def _with_slopes(panel: Panel, rows: Sequence[Row], full: str) -> Panel:
    """Add the slopes of the rows, and their differences to the row with the variant ``full``, for three columns on."""
    try:
        columns = [float(column) for column in panel.columns]
    except ValueError:
        return panel
    reference = next((label for label, names in panel.rows.items() if full in names), None)
    if reference is None or len(columns) < 3:
        return panel
    named = {row.name: row.figures.get("score") for row in rows}
    slopes = {
        label: [_slope(columns, values) for values in _by_seed([named.get(name or "") for name in names])]
        for label, names in panel.rows.items()
    }
    rivals = [label for label in slopes if label != reference]
    differences = [paired_difference(slopes[label], slopes[reference]) for label in rivals]
    corrected = holm([d["p"] for d in differences])
    against = {
        label: Difference(**d, p_corrected=p, word=conclusion(d, "none", p))
        for label, d, p in zip(rivals, differences, corrected, strict=True)
    }
    means = {k: Mean(**{**mean_interval(v), "per_seed": tuple(v)}) for k, v in slopes.items()}
    return replace(panel, slopes=means, slope_differences=against)


def _by_seed(scores: Sequence[Mean | None]) -> list[list[float | None]]:
    """The scores of a row of the panel, for each seed."""
    n = max((len(s.per_seed) for s in scores if s), default=0)
    return [[s.per_seed[i] if s else None for s in scores] for i in range(n)]


def _slope(columns: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Least-squares slope through the values that are not ``None``; ``None`` for fewer than three."""
    import numpy as np

    known = [(x, y) for x, y in zip(columns, values, strict=True) if y is not None]
    if len(known) < 3:
        return None
    x, y = np.array(known).T
    return float(np.polyfit(x, y, 1)[0])
