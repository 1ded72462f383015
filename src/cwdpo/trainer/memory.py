"""The values that an objective keeps from step to step; every checkpoint contains them."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class StepMemory(TrainerCallback):  # type: ignore[misc]
    """The values of :meth:`cwdpo.objectives.base.Objective.remember`, stored in ``trainer_state.json``."""

    def __init__(self) -> None:
        self.values: tuple[float, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the values of a resumed run."""
        self.values = tuple(state.stateful_callbacks.get("memory", {}).get("values", ()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the values into the trainer's state, so that the next checkpoint contains them."""
        if self.values:
            state.stateful_callbacks["memory"] = {"values": list(self.values)}
