"""Cells whose policy was judged at every measurement: what alarms and stops are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.lab.cell import CellJob
from cwdpo.lab.spec import Variant
from cwdpo.rundir import RunDir

DROP = 0.03
"""A judged score this far below the start of stage 2 counts as damage."""


@dataclass(frozen=True)
class Traced:
    """A finished cell: readings and metrics of both stages, and (step, judged score) of stage 2."""

    key: str
    name: str
    variant: Variant
    readings: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    trace: list[tuple[int, float]]

    @classmethod
    def load(cls, job: CellJob, name: str, variant: Variant, figures: dict[str, Any]) -> Traced:
        """Read what a cell, and the first stage that it starts from, have written."""
        runs = [RunDir(folder) for folder in (job.first, job.folder) if folder is not None]
        readings = [row for run in runs for row in run.readings()]
        metrics = [row for run in runs for row in run.metrics()]
        trace = [(row["step"], row["score"]) for row in figures.get("trace", ())]
        return cls(job.key, name, variant, readings, metrics, trace)


def damage_step(trace: Sequence[tuple[int, float]], drop: float = DROP) -> int | None:
    """First measured step whose score lies ``drop`` below the first one's; ``None`` where none does."""
    return next((step for step, score in trace if score <= trace[0][1] - drop), None)


def halves(runs: Sequence[Traced]) -> tuple[list[Traced], list[Traced]]:
    """Every other run for choosing thresholds, the rest for reporting; fixed by the order of the keys."""
    ordered = sorted(runs, key=lambda run: run.key)
    return ordered[::2], ordered[1::2]
