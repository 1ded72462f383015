"""The cooling weight that each kind of held-out negative would get now."""

from __future__ import annotations

from cwdpo.objectives.cw_dpo import cooling_weight
from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class Cooling(Probe):
    """Mean weight by kind of negative; nothing where the objective does not cool."""

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``cooling/weight/<kind>``."""
        if held.floor is None or held.tau is None:
            return []
        weight = cooling_weight(held.mean_logp, held.floor, held.tau)
        kinds = [k for k in held.kind_names() if k != "chosen"]
        return [held.reading(f"cooling/weight/{k}", weight[held.of(k)], "weight") for k in kinds]
