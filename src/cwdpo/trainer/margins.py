"""The running mean of the steps' margins, for objectives that compare a step with the usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback

MOMENTUM = 0.9
"""Of the running mean: beta-DPO's (arXiv 2407.08639)."""


class MarginHistory(TrainerCallback):  # type: ignore[misc]
    """Kept in ``trainer_state.json``, so that a resumed run goes on with it."""

    def __init__(self) -> None:
        self.usual: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the value of a resumed run."""
        self.usual = state.stateful_callbacks.get("margins", {}).get("usual")

    def of_step(self, accelerator: Any, own: Sequence[float]) -> tuple[tuple[float, ...], float]:
        """All margins of the step over processes, and their running mean before it; takes the step in."""
        shards = [list(own)] if accelerator.num_processes == 1 else gather_object([list(own)])
        found = tuple(m for shard in shards for m in shard)
        before = self.usual or 0.0
        if found:
            self.usual = MOMENTUM * before + (1 - MOMENTUM) * float(np.mean(found))
        return found, before

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the value in the next checkpoint."""
        if self.usual is not None:
            state.stateful_callbacks["margins"] = {"usual": self.usual}
