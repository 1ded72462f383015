"""Cells whose policy was judged at every measurement; alarms and stops are compared with these scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.lab.cell import CellJob
from cwdpo.lab.spec import Variant
from cwdpo.rundir import RunDir

DROP = 0.03
"""A judged score this far below the score at the start of stage 2 is damage."""


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
        """Read the files of a cell and of the first stage that it starts from."""
        runs = [RunDir(folder) for folder in (job.first, job.folder) if folder is not None]
        readings = [row for run in runs for row in run.readings()]
        metrics = [row for run in runs for row in run.metrics()]
        trace = [(row["step"], row["score"]) for row in figures.get("trace", ())]
        return cls(job.key, name, variant, readings, metrics, trace)


def damage_step(trace: Sequence[tuple[int, float]], drop: float = DROP) -> int | None:
    """First measured step whose score is ``drop`` below the first score; ``None`` if there is none."""
    return next((step for step, score in trace if score <= trace[0][1] - drop), None)


def halves(runs: Sequence[Traced]) -> tuple[list[Traced], list[Traced]]:
    """Every second run for choosing thresholds, the others for reporting; in the order of their keys."""
    ordered = sorted(runs, key=lambda run: run.key)
    return ordered[::2], ordered[1::2]
