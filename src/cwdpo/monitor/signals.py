"""What measures a stage and what acts on its readings, as one bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import TrainerCallback

from cwdpo.config import Recipe
from cwdpo.curriculum.base import CURRICULA
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.monitor.instruments import ProbeCallback
from cwdpo.monitor.stopping import Stopping
from cwdpo.monitor.window import CurriculumCallback, hardness_of
from cwdpo.objectives.base import Objective
from cwdpo.rundir import RunDir
from cwdpo.trainer.trainer import PreferenceTrainer


@dataclass
class Signals:
    """What measures a stage and what acts on its readings."""

    probes: ProbeCallback | None = None
    stopping: Stopping | None = None
    curriculum: CurriculumCallback | None = None

    @classmethod
    def of(
        cls,
        probes: ProbeCallback | None,
        recipe: Recipe,
        stage: str,
        objective: Objective,
        encoded: Sequence[EncodedExample],
        run: RunDir,
        say: Callable[[str], None],
    ) -> Signals:
        """As the recipe asks; only a stage with a reference is stopped and steered."""
        if probes is None or not objective.needs_reference:
            return cls(probes)
        stopping, curriculum = None, None
        if recipe.stop:
            stopping = Stopping(probes, recipe.stop, run, stage, say)
        if recipe.curriculum["name"] != "steady":
            built = CURRICULA.build(recipe.curriculum)
            in_rounds = recipe.negatives.on_policy_fraction is not None
            hardness = replace(hardness_of(objective, encoded), rounds=in_rounds)
            curriculum = CurriculumCallback(built, hardness, probes, run, stage)
        return cls(probes, stopping, curriculum)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """In the order in which they must stand."""
        return [c for c in (self.probes, self.stopping, self.curriculum) if c is not None]

    def connect(self, trainer: PreferenceTrainer) -> None:
        """Hand the trainer what it asks of them, and the probes what its trackers take."""
        if self.probes is not None:
            self.probes.reports = trainer.report
        if self.stopping is not None:
            trainer.add_to_checkpoint = self.stopping.add_to_checkpoint
        if self.curriculum is not None:
            trainer.select = self.curriculum.select
