"""How far a study is: finished cells, optimizer steps, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

FEWEST_STEPS = 20
"""Number of steps before the time left is estimated."""


class Progress:
    """Counts the steps and cells of a study.

    Args:
        steps: the optimizer steps of each cell, by its key; 0 for a cell that does not train.
        now: the time in seconds.

    Attributes:
        total: optimizer steps of all cells.
        finished: number of finished or failed cells.
    """

    def __init__(self, steps: Mapping[str, int], now: Callable[[], float] = time.monotonic) -> None:
        self._left = dict(steps)
        self._now, self._began = now, now()
        self._taken = 0
        self.total = sum(steps.values())
        self.finished = 0

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self._left)

    @property
    def done(self) -> int:
        """Optimizer steps that need not be taken any more: taken, or of a cell that was finished before or failed."""
        return self.total - sum(self._left.values())

    def step(self, key: str) -> None:
        """Count a step of a cell."""
        self._taken += 1
        self._left[key] = max(0, self._left.get(key, 0) - 1)

    def end(self, key: str) -> None:
        """Count a cell that finished or failed."""
        self._left[key] = 0
        self.finished += 1

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end, from the steps so far; ``None`` while there are too few."""
        if self._taken < FEWEST_STEPS:
            return None
        return (self._now() - self._began) / self._taken * (self.total - self.done)

    @property
    def left(self) -> str:
        """The time left in words; empty while it is not known.

        >>> clock = iter([0.0, 90.0, 90.0])
        >>> progress = Progress({"a": 50}, now=lambda: next(clock))
        >>> for _ in range(20):
        ...     progress.step("a")
        >>> progress.left
        'about 2 min left'
        """
        seconds = self.seconds_left
        if seconds is None:
            return ""
        return "less than 1 min left" if seconds < 50 else f"about {max(1, round(seconds / 60))} min left"
