"""What an objective keeps from step to step, stored with every checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class StepMemory(TrainerCallback):  # type: ignore[misc]
    """The values that :meth:`cwdpo.objectives.base.Objective.remember` gave, kept in ``trainer_state.json``."""

    def __init__(self) -> None:
        self.values: tuple[float, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the values of a resumed run."""
        self.values = tuple(state.stateful_callbacks.get("memory", {}).get("values", ()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the values into the next checkpoint."""
        if self.values:
            state.stateful_callbacks["memory"] = {"values": list(self.values)}
