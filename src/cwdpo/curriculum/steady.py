"""No curriculum: train on every negative, whatever the readings are."""

from __future__ import annotations

from collections.abc import Mapping

from cwdpo.curriculum.base import Curriculum, Hardness, Plan


class Steady(Curriculum):
    """Keeps the plan of the start."""

    def first(self, hardness: Hardness) -> Plan:
        """An infinite window."""
        del hardness
        return Plan()

    def following(self, plan: Plan, readings: Mapping[str, float], hardness: Hardness) -> Plan:
        """The same plan."""
        del readings, hardness
        return plan
