"""Cells of a study to its summary: means with intervals, and paired differences to the full method or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cwdpo.evaluation.intervals import mean_interval
from cwdpo.evaluation.paired import conclusion, holm, paired_difference
from cwdpo.lab.grid import CellResult
from cwdpo.lab.spec import Study, overrides_of
from cwdpo.lab.summary import FIGURES, win_over_seeds
from cwdpo.rundir import RunDir

Figure = dict[str, Any]


def outcome(
    out: Path,
    study: Study,
    seeds: Sequence[int],
    results: Mapping[str, CellResult],
    chosen: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The study's summary.json; see :mod:`cwdpo.report.render` for its shape.

    Figures are compared by seed: every variant sees the same pictures in the same order. p-values are corrected
    (Holm) within a figure, for the number of variants that are compared with another.
    """
    cells = {
        name: [_scored(study, _result(results, f"{name}-seed{seed}")) for seed in seeds]
        for name in study.variants
    }
    figures = figures_of(study, cells)
    rows = [_row(out, study, name, seeds, cells, figures, chosen) for name in study.variants]
    _compare(rows, figures)
    hours = sum(_seconds(out, key) for key in results) / 3600
    return {
        "kind": "study",
        "title": study.title or study.name,
        "question": study.question,
        "full": study.full,
        "seeds": list(seeds),
        "figures": figures,
        "variants": rows,
        "panel": panel_of(study, rows),
        "shared": [
            {"key": key, "error": r.error}
            for key, r in sorted(results.items())
            if r.status == "failed" and key not in {f"{n}-seed{s}" for n in study.variants for s in seeds}
        ],
        "provenance": {
            "study": study.name,
            "cells": f"{len(results)} cells, {hours:.2f} hours of one process each",
            "intervals": "t interval over seeds; differences paired by seed",
            "p-values": "paired t test over seeds, Holm-corrected within a column",
        },
    }


def figures_of(study: Study, cells: Mapping[str, Sequence[CellResult]]) -> list[Figure]:
    """The table's columns: the world's, or whatever the study's metrics gave."""
    found = [c.figures for row in cells.values() for c in row if c.status == "done"]
    terms = " ".join(f"{weight:+g} {key}" for key, weight in study.score.items())
    score = {
        "key": "score",
        "label": "score",
        "better": "higher",
        "digits": 3,
        "help": f"The sum by which a sweep chooses: {terms}",
    }
    scored = [score] if any("score" in f for f in found) else []
    if not found or any("judge_score" in f for f in found):
        label = f"win rate vs {study.label(study.full)}"
        return scored + [
            {
                "key": key, "label": label if key == "win_rate" else text, "better": better, "digits": digits,
                "help": f"by the judge's score, prompt by prompt, against {study.label(study.full)}; a tie counts half"
                if key == "win_rate" else note,
            }
            for key, text, better, digits, note in FIGURES
        ]  # fmt: skip
    from cwdpo.metrics.base import describe

    keys = [k for k, v in found[0].items() if (isinstance(v, int | float) or v is None) and k != "score"]
    return scored + [describe(key) for key in keys]


def panel_of(study: Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The scores of variants that have a ``cell``, as a grid of labels; ``None`` without such variants."""
    placed = {study.variants[row["name"]].cell: row["figures"].get("score") for row in rows}
    cells = {cell: value for cell, value in placed.items() if cell is not None and value is not None}
    if not cells:
        return None
    names, columns = (list(dict.fromkeys(cell[side] for cell in cells)) for side in (0, 1))
    return {
        "columns": columns,
        "rows": [{"label": n, "values": [cells.get((n, column)) for column in columns]} for n in names],
    }


def _scored(study: Study, cell: CellResult) -> CellResult:
    score = study.scored(cell.figures)
    return cell if score is None else replace(cell, figures={**cell.figures, "score": score})


def _result(results: Mapping[str, CellResult], key: str) -> CellResult:
    return results.get(key) or CellResult(key, "failed", {}, "never ran: what it starts from failed", 0.0)


def _row(
    out: Path,
    study: Study,
    name: str,
    seeds: Sequence[int],
    cells: Mapping[str, Sequence[CellResult]],
    figures: Sequence[Figure],
    chosen: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    own = cells[name]
    values = {
        f["key"]: mean_interval([c.figures.get(f["key"]) for c in own])
        for f in figures
        if f["key"] != "win_rate"
    }
    if any(f["key"] == "win_rate" for f in figures):
        scores = [c.figures.get("scores") for c in own]
        values["win_rate"] = win_over_seeds(scores, [c.figures.get("scores") for c in cells[study.full]])
    return {
        "name": name,
        "label": study.label(name),
        "overrides": overrides_of(study, name, chosen),
        "figures": values,
        "rival": study.rival(name),
        "against": {},
        "calibration": _calibration(out, own),
        "cells": [
            {"seed": seed, "status": c.status, "error": c.error, "seconds": _seconds(out, c.key)}
            for seed, c in zip(seeds, own, strict=True)
        ],
    }


def _calibration(out: Path, cells: Sequence[CellResult]) -> dict[str, list[float]]:
    found = [RunDir(out / "cells" / c.key).json("calibration.json") for c in cells]
    known = [c for c in found if c]
    return {name: [round(c[name], 3) for c in known] for name in ("floor", "tau")} if known else {}


def _seconds(out: Path, key: str) -> float:
    return float(RunDir(out / "cells" / key).json("timing.json").get("seconds", 0.0))


def _compare(rows: Sequence[dict[str, Any]], figures: Sequence[Figure]) -> None:
    """Fill ``against``: each variant minus its rival."""
    named = {row["name"]: row["figures"] for row in rows}
    others = [row for row in rows if row["rival"]]
    for figure in figures:
        key = figure["key"]
        if key == "win_rate":
            continue
        found = [
            paired_difference(row["figures"][key]["per_seed"], named[row["rival"]][key]["per_seed"])
            for row in others
        ]
        corrected = holm([d["p"] for d in found])
        for row, difference, p in zip(others, found, corrected, strict=True):
            word = conclusion(difference, figure["better"], p)
            row["against"][key] = {**difference, "p_corrected": p, "word": word}
