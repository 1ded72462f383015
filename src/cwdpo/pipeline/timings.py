"""Writes where the time of a run goes to ``timings.jsonl``."""

from __future__ import annotations

from typing import Any

from cwdpo.clock import current
from cwdpo.rundir import RunDir
from cwdpo.stage.model import data_workers
from cwdpo.stage.stage import Stage

STEP = "step: "
"""How the parts of an optimizer step begin."""
IMAGES = "step: images"
MOST_WAITING = 0.1
"""Share of the time of the steps that images may take without a note."""
LONG = 30.0
"""Seconds of steps from which on the note is worth reading."""


def store_timings(run: RunDir, part: str, **more: Any) -> dict[str, float]:
    """Append the seconds of each part since the last row, and its CPU seconds, if a clock is running.

    Args:
        run: the run folder.
        part: what they were spent for: a stage, ``start`` or ``end``.
        more: further values of the row.

    Returns:
        The seconds by part.
    """
    clock = current()
    if clock is None:
        return {}
    taken, cpu = clock.take_both()
    row = {
        "stage": part,
        **more,
        "elapsed": round(clock.elapsed, 3),
        "parts": _shown(taken),
        "cpu": _shown(cpu),
    }
    run.append("timings.jsonl", [row])
    return taken


def _shown(seconds: dict[str, float]) -> dict[str, float]:
    """To a millisecond, without parts of less."""
    return {name: round(spent, 3) for name, spent in sorted(seconds.items()) if spent >= 5e-4}


class StepTimes:
    """The times of a stage's optimizer steps, row by row.

    Args:
        stage: the stage; the time before it, for instance for its reference pass, is in its first row.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._first: tuple[int, float] | None = None
        self._steps = self._images = 0.0

    def store(self, step: int, steps: int) -> None:
        """Append a row with the estimated remaining seconds of the stage.

        Args:
            step: steps that are done.
            steps: of the whole stage.
        """
        clock = current()
        if clock is None:
            return
        now, remaining = clock.elapsed, None
        if self._first is None:  # the first step also warms up, so that the estimate begins after it
            self._first = step, now
        elif step > self._first[0]:
            pace = (now - self._first[1]) / (step - self._first[0])
            remaining = round(pace * max(steps - step, 0), 1)
        taken = store_timings(self.stage.run, self.stage.name, step=step, remaining=remaining)
        self._steps += sum(seconds for name, seconds in taken.items() if name.startswith(STEP))
        self._images += taken.get(IMAGES, 0.0)

    def end(self) -> None:
        """Say so if the steps waited long for images."""
        waited = self._images / self._steps if self._steps else 0.0
        if self._steps < LONG or waited <= MOST_WAITING:
            return
        workers = data_workers(self.stage.recipe.train)
        advice = (
            "with train.dataloader_workers other processes read them during a step"
            if not workers
            else f"{workers} data workers are too few (train.dataloader_workers), if cores are free"
        )
        self.stage.listener.note(
            f"{self.stage.name}: the steps waited for images {waited:.0%} of their time: {advice}; "
            "model.processor_options can make images smaller (timings.jsonl, report)"
        )
