"""What a curriculum is: readings -> which negatives take part next. Pure; no torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cwdpo.registry import Component, Registry


@dataclass(frozen=True)
class Plan:
    """Which negatives take part until the next measurement or round.

    Attributes:
        low, high: hardness window: mean_logp of a negative under the reference, nats per token, ends included.
        fresh: added to the share of on-policy negatives of the next round (``negatives.on_policy_fraction``).
        reason: why this plan and not the last one, in words.
    """

    low: float = -math.inf
    high: float = math.inf
    fresh: float = 0.0
    reason: str = ""

    def takes(self, mean_logp: float) -> bool:
        """Whether a negative lies in the window."""
        return self.low <= mean_logp <= self.high

    def to_json(self) -> dict[str, Any]:
        """For checkpoints and the run folder: an open end is null."""
        ends = {
            name: value if math.isfinite(value) else None
            for name, value in (("low", self.low), ("high", self.high))
        }
        return {**asdict(self), **ends}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` wrote."""
        low, high = row["low"], row["high"]
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        return cls(*ends, row.get("fresh", 0.0), row["reason"])


@dataclass(frozen=True)
class Hardness:
    """What the negatives of the data are like under the reference: nats per token.

    ``floor`` and ``tau`` are the cooling's (or what its calibration would find); ``mean_logps`` are those of all
    negatives at hand. ``rounds``: negatives are sampled anew at each round, so that their share may move.
    """

    floor: float
    tau: float
    mean_logps: tuple[float, ...] = ()
    rounds: bool = False


class Curriculum(Component, ABC):
    """Moves the plan by what the probes read."""

    @abstractmethod
    def first(self, hardness: Hardness) -> Plan:
        """The plan at the start of a stage."""

    @abstractmethod
    def following(self, plan: Plan, readings: Mapping[str, float], hardness: Hardness) -> Plan:
        """The next plan.

        Args:
            plan: the one in force.
            readings: the last held-out readings by name; those without a value are absent.
            hardness: of the stage.

        Returns:
            A new plan with its reason, or ``plan`` itself where nothing has to change.
        """


CURRICULA: Registry[Curriculum] = Registry("curriculum", "cwdpo.curriculum", Curriculum)


def next_round(
    curriculum: Curriculum, plan: Plan | None, readings: Mapping[str, float | None], hardness: Hardness
) -> Plan:
    """The settings of the next round of negatives: the one function that rounds call.

    Args:
        plan: of the round that ends; ``None`` before the first.
        readings: the last held-out readings by name.
    """
    if plan is None:
        return curriculum.first(hardness)
    known = {name: value for name, value in readings.items() if value is not None}
    return curriculum.following(plan, known, hardness)
