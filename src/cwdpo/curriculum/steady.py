"""No curriculum: every negative takes part, whatever the probes read."""

from __future__ import annotations

from collections.abc import Mapping

from cwdpo.curriculum.base import Curriculum, Hardness, Plan


class Steady(Curriculum):
    """The plan of the start, to the end."""

    def first(self, hardness: Hardness) -> Plan:
        """An open window."""
        del hardness
        return Plan()

    def following(self, plan: Plan, readings: Mapping[str, float], hardness: Hardness) -> Plan:
        """The same plan."""
        del readings, hardness
        return plan
