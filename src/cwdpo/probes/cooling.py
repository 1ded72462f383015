"""The current cooling weight of each kind of held-out negative, and whether floor and tau are still right."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.objectives.cw_dpo import calibrate, cooling_weight
from cwdpo.probes.base import HeldOut, Probe, mask_of
from cwdpo.records import Reading

COOLED = 0.1
"""A negative with a lower weight counts as cooled."""


class Cooling(Probe):
    """Weights by kind and by origin, and how far floor and tau are from what a new calibration would give.

    No readings if the objective has no adaptive cooling. The two distances need sampled responses: those of the
    current policy if there are any, else those of the starting policy, scored by the current policy.
    """

    readings: ClassVar[tuple[str, ...]] = (
        "cooling/weight/",
        "cooling/origin/",
        "cooling/cooled",
        "cooling/floor_gap",
        "cooling/tau_gap",
    )

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``cooling/weight/<kind>``, ``cooling/origin/<origin>``, ``cooling/cooled``, ``cooling/*_gap``."""
        floor, tau = held.scale.floor, held.scale.tau
        if floor is None or tau is None:
            return []
        weight, negatives = cooling_weight(held.mean_logp, floor, tau), held.negatives
        readings = [
            held.reading(f"cooling/weight/{k}", weight[held.of(k) & negatives], "weight")
            for k in held.negative_kinds()
        ]
        for origin in sorted({o for o, n in zip(held.origins, negatives.tolist(), strict=False) if n}):
            own = mask_of(held.origins, origin) & negatives
            readings.append(held.reading(f"cooling/origin/{origin}", weight[own], "weight"))
        readings.append(held.reading("cooling/cooled", (weight[negatives] < COOLED).double(), "share"))
        return readings + self._gaps(held, floor, tau)

    @staticmethod
    def _gaps(held: HeldOut, floor: float, tau: float) -> list[Reading]:
        """Floor and tau minus the values that a calibration on the policy's samples would give now."""
        for kind in ("on_policy", "chosen_initial"):
            mean_logp = held.mean_logp[held.of(kind)]
            if len(mean_logp) > 1:
                now_floor, now_tau = calibrate(mean_logp.tolist())
                n = len(mean_logp)
                return [
                    Reading("cooling/floor_gap", floor - now_floor, n, "nats/token", held.step),
                    Reading("cooling/tau_gap", tau - now_tau, n, "nats/token", held.step),
                ]
        return []
