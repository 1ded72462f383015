"""The page of a study that runs: what is known so far, without what takes long to draw."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cwdpo.lab.grid import CellResult
from cwdpo.lab.outcome import outcome
from cwdpo.lab.plan import Plan
from cwdpo.lab.progress import Progress
from cwdpo.lab.spec import Study
from cwdpo.report.render import write_running

SECONDS = 5
"""After how many seconds the page reloads itself."""


@dataclass
class LivePage:
    """Writes ``report.html`` again after each cell of a variant.

    Attributes:
        out, study, seeds, planned, chosen: as in :func:`cwdpo.lab.outcome.outcome`.
    """

    out: Path
    study: Study
    seeds: Sequence[int]
    planned: Plan
    chosen: Mapping[str, Sequence[str]]
    _results: dict[str, CellResult] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The page."""
        return self.out / "report.html"

    def add(self, result: CellResult, progress: Progress) -> None:
        """Note a finished cell, and write the page."""
        self._results[result.key] = result
        # A full disk: the cells say so, and the page is written again at the end.
        with contextlib.suppress(OSError):
            self.write(progress)

    def write(self, progress: Progress | None) -> None:
        """Write the page; without a progress, nothing has begun."""
        summary = outcome(
            self.out, self.study, self.seeds, self.planned, self._results, self.chosen, running=True
        )
        done = f"{progress.finished} of {progress.cells} runs done" if progress else "begins"
        status = ", ".join(filter(None, (done, progress.left if progress else "")))
        write_running(self.out, summary, f"Running: {status}. This page reloads by itself.", SECONDS)
