"""The readings and metrics of a run as series over steps, for rules. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

View = Literal["value", "change", "fall", "rise", "width", "low", "n"]


@dataclass(frozen=True)
class Point:
    """One number of a series; a reading also has ``n`` and ``width``, half of its 95% interval."""

    step: int
    value: float
    n: int = 0
    width: float | None = None


class Series:
    """Readings and metrics of one run by stage and name, ordered by step.

    Rows without a finite number are left out.
    """

    def __init__(self, readings: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]) -> None:
        self._found: dict[tuple[str, str], dict[int, Point]] = {}
        for row in readings:
            self._take(row.get("stage"), row.get("name"), row.get("step"), row.get("value"), row)
        for row in metrics:
            for name, value in row.items():
                if name not in ("stage", "step"):
                    self._take(row.get("stage"), f"train/{name}", row.get("step"), value, {})

    def _take(self, stage: Any, name: Any, step: Any, value: Any, row: Mapping[str, Any]) -> None:
        if not (_number(value) and _number(step)):
            return
        low, high, n = row.get("low"), row.get("high"), row.get("n")
        width = (high - low) / 2 if _number(low) and _number(high) else None  # type: ignore[operator]
        point = Point(int(step), float(value), int(n) if _number(n) else 0, width)  # type: ignore[arg-type]
        self._found.setdefault((str(stage), str(name)), {})[point.step] = point

    def names(self, stage: str) -> list[str]:
        """Names of a stage's series; the names of training metrics start with ``train/``."""
        return sorted(name for own, name in self._found if own == stage)

    def points(self, stage: str, name: str) -> list[Point]:
        """The points of a series, ordered by step; empty if nothing was recorded."""
        found = self._found.get((stage, name), {})
        return [found[step] for step in sorted(found)]

    def last_step(self, stage: str) -> int:
        """The last step for which a stage recorded anything; 0 if it recorded nothing."""
        return max((max(points) for (own, _), points in self._found.items() if own == stage), default=0)

    def entropy(self, stage: str) -> float | None:
        """The policy's entropy at the first measurement of a stage, nats per token; ``None`` if it was not measured."""
        return next((point.value for point in self.points(stage, "entropy")), None)

    def viewed(self, stage: str, name: str, view: View = "value", window: int = 1) -> list[tuple[int, float]]:
        """A series as ``(step, number)``, after a transformation.

        Args:
            stage, name: which series.
            view: ``value``: the number itself; ``change``: since the first point; ``fall``: below the highest so far;
                ``rise``: above the lowest so far; ``width``: half of the interval; ``low``: its lower end; ``n``.
            window: average each number over the last ``window`` points; the first ``window - 1`` are left out.
                Not used for ``width``, ``low`` and ``n``.
        """
        points = self.points(stage, name)
        if view == "n":
            return [(p.step, float(p.n)) for p in points]
        if view == "width":
            return [(p.step, p.width) for p in points if p.width is not None]
        if view == "low":
            return [(p.step, p.value - p.width) for p in points if p.width is not None]
        means = [
            (points[i].step, sum(p.value for p in points[i - window + 1 : i + 1]) / window)
            for i in range(window - 1, len(points))
        ]
        seen: list[tuple[int, float]] = []
        for i, (step, value) in enumerate(means):
            past = [v for _, v in means[: i + 1]]
            base = {"value": 0.0, "change": past[0], "fall": max(past), "rise": min(past)}[view]
            seen.append((step, base - value if view == "fall" else value - base))
        return seen


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
