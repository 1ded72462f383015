"""The callbacks that measure a stage and act on its readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import TrainerCallback

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.monitor.instruments import Instruments, ProbeCallback
from cwdpo.monitor.stopping import Stopping
from cwdpo.monitor.window import CurriculumCallback


@dataclass
class Signals:
    """The callbacks for measurements, early stopping and curriculum; ``None`` where the stage does not use one."""

    probes: ProbeCallback | None = None
    stopping: Stopping | None = None
    curriculum: CurriculumCallback | None = None

    @classmethod
    def of(cls, instruments: Instruments | None, rows: Sequence[EncodedExample]) -> Signals:
        """The callbacks that the recipe sets; only a stage with a reference has early stopping and a curriculum.

        Args:
            instruments: measures the stage; ``None`` if there is no held-out prompt.
            rows: the stage's training examples, with reference values.
        """
        if instruments is None:
            return cls()
        probes, stage = ProbeCallback(instruments), instruments.stage
        if not stage.objective.needs_reference:
            return cls(probes)
        stopping = Stopping(probes) if stage.recipe.stop else None
        steered = stage.recipe.curriculum["name"] != "steady"
        return cls(probes, stopping, CurriculumCallback(probes, rows) if steered else None)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """The callbacks in the order in which they must be called."""
        return [c for c in (self.probes, self.stopping, self.curriculum) if c is not None]
