"""Harder and fresher negatives when their weights fall, gentler ones when chosen drifts down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field, model_validator

from cwdpo.curriculum.base import Curriculum, Hardness, Plan


class ByReadings(Curriculum):
    """A window on hardness, in units of the cooling's tau around its floor, moved one notch at a measurement.

    Drift is looked at first: a policy that loses its chosen responses gets gentler negatives even where the
    weights call for harder ones. Here a gentle negative is one that the reference finds unlikely: the hardest ones,
    which share most with chosen, leave first. The window never closes below ``narrowest``. Where stage 2 runs in
    rounds, the share of on-policy negatives of the next round moves along.

    Args:
        start_low, start_high: the window at the start: ``floor + k * tau`` for these k.
        notch: of each move, in tau.
        narrowest: smallest width of the window, in tau.
        drift_below: ``delta_logp/chosen`` (nats per token) under which negatives become gentler.
        cooled_above: ``cooling/cooled`` (share of held-out negatives with a weight under 0.1) over which they
            become harder and the next round's fresher.
        fresh_notch: of each move, in the share of on-policy negatives; 0 leaves their share as the recipe has it.
    """

    start_low: float = -6.0
    start_high: float = 6.0
    notch: float = Field(1.0, gt=0)
    narrowest: float = Field(2.0, gt=0)
    drift_below: float = -0.01
    cooled_above: float = Field(0.6, ge=0, le=1)
    fresh_notch: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _wide_enough(self) -> ByReadings:
        if self.start_high - self.start_low < self.narrowest:
            raise ValueError("start_high - start_low must be at least narrowest")
        return self

    def first(self, hardness: Hardness) -> Plan:
        """The starting window."""
        low, high = (hardness.floor + k * hardness.tau for k in (self.start_low, self.start_high))
        return Plan(low, high, reason="start")

    def following(self, plan: Plan, readings: Mapping[str, float], hardness: Hardness) -> Plan:
        """One notch, or none."""
        notch, width = self.notch * hardness.tau, self.narrowest * hardness.tau
        fresh = self.fresh_notch if hardness.rounds else 0.0
        drift, cooled = readings.get("delta_logp/chosen"), readings.get("cooling/cooled")
        if drift is not None and drift < self.drift_below:
            # What lies above the hardest negative at hand is empty: the first notch has to bite.
            top = min(plan.high, max(hardness.mean_logps, default=plan.high))
            high = min(plan.high, max(top - notch, plan.low + width))
            moved = replace(plan, high=high, fresh=max(plan.fresh - fresh, -1.0))
            reason = f"gentler: delta_logp/chosen {drift:.4g}"
        elif cooled is not None and cooled > self.cooled_above:
            bottom = max(plan.low, min(hardness.mean_logps, default=plan.low))
            low = max(plan.low, min(bottom + notch, plan.high - width))
            moved = replace(plan, low=low, fresh=min(plan.fresh + fresh, 1.0))
            reason = f"harder: cooling/cooled {cooled:.4g}"
        else:
            return plan
        return plan if moved == plan else replace(moved, reason=reason)
