"""What a curriculum is: a function from readings to the negatives to train on next. It does not import torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cwdpo.registry import Component, Registry


@dataclass(frozen=True)
class Plan:
    """Which negatives to train on until the next measurement or round.

    Attributes:
        low, high: the window of hardness, that is of a negative's mean_logp under the reference model, in nats per
            token; both ends are included.
        fresh: added to the share of on-policy negatives in the next round (``negatives.on_policy_fraction``).
        reason: why the plan changed, for people to read.
    """

    low: float = -math.inf
    high: float = math.inf
    fresh: float = 0.0
    reason: str = ""

    def takes(self, mean_logp: float) -> bool:
        """Whether a negative of this mean_logp (nats per token) is in the window."""
        return self.low <= mean_logp <= self.high

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, for checkpoints and the run folder; an infinite end becomes null."""
        ends = {
            name: value if math.isfinite(value) else None
            for name, value in (("low", self.low), ("high", self.high))
        }
        return {**asdict(self), **ends}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Plan:
        """The plan from the JSON of :meth:`to_json`."""
        low, high = row["low"], row["high"]
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        return cls(*ends, row.get("fresh", 0.0), row["reason"])


@dataclass(frozen=True)
class Hardness:
    """How likely the negatives of the data are under the reference model.

    Attributes:
        floor, tau: of the cooling weight, in nats per token; calibrated even if the objective has no cooling weight.
        mean_logps: mean_logp of every negative under the reference model, in nats per token.
        rounds: whether on-policy negatives are sampled again in each round, so that their share can change.
    """

    floor: float
    tau: float
    mean_logps: tuple[float, ...] = ()
    rounds: bool = False


class Curriculum(Component, ABC):
    """Changes the plan according to the probes' readings."""

    @abstractmethod
    def first(self, hardness: Hardness) -> Plan:
        """The plan at the start of a stage."""

    @abstractmethod
    def following(self, plan: Plan, readings: Mapping[str, float], hardness: Hardness) -> Plan:
        """The next plan.

        Args:
            plan: the current plan.
            readings: the latest held-out readings by name; readings without a value are absent.
            hardness: of the stage's negatives.

        Returns:
            A new plan with its reason, or ``plan`` itself if nothing has to change.
        """


CURRICULA: Registry[Curriculum] = Registry("curriculum", "cwdpo.curriculum", Curriculum)


def next_round(
    curriculum: Curriculum, plan: Plan | None, readings: Mapping[str, float | None], hardness: Hardness
) -> Plan:
    """The plan for the next round.

    Args:
        curriculum: decides.
        plan: the plan of the round that ends; ``None`` before the first round.
        readings: the latest held-out readings by name; ``None`` is a reading without a value.
        hardness: of the stage's negatives.
    """
    if plan is None:
        return curriculum.first(hardness)
    known = {name: value for name, value in readings.items() if value is not None}
    return curriculum.following(plan, known, hardness)
