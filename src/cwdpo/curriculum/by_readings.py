"""Harder and more on-policy negatives when cooling weights are low, easier ones when chosen becomes less likely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field, model_validator

from cwdpo.curriculum.base import Curriculum, Hardness, Plan


class ByReadings(Curriculum):
    """A window of hardness around the cooling's floor, in units of its tau, changed by one notch per measurement.

    Drift is checked first: if the chosen responses become less likely, negatives become easier, even if the cooling
    weights ask for harder ones. Easier means less likely under the reference model: the upper end of the window moves
    down, so the hardest negatives, which are most similar to chosen, are left out first. The window is never narrower
    than ``narrowest``. If stage 2 runs in rounds, the share of on-policy negatives in the next round changes too.

    Args:
        start_low, start_high: the window at the start is ``floor + k * tau`` for these two k.
        notch: how far an end of the window moves, in tau.
        narrowest: smallest width of the window, in tau.
        drift_below: negatives become easier when ``delta_logp/chosen`` (nats per token) is below this.
        cooled_above: negatives become harder, and the next round gets more on-policy ones, when ``cooling/cooled``
            (share of held-out negatives with a weight below 0.1) is above this.
        fresh_notch: how far the share of on-policy negatives changes; 0 keeps the recipe's share.
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
            # Start from the hardest negative, not from the window's end: there may be no negatives in between, and
            # then the first notch would leave none out.
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
