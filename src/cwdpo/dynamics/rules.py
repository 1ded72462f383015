"""Rules over readings, such as ``chosen_delta < -0.02``: read, never evaluated as code. No torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cwdpo.errors import RecipeError, nearest
from cwdpo.probes.base import known_readings

CHOSEN_FALL = -0.02
"""``delta_logp/chosen`` below this is an alarm, nats per token (measured: docs/decisions.md)."""
KL_DRIFT = 0.04
"""``kl`` above this is an alarm, nats per token."""
THRESHOLDS = {"chosen_fall": CHOSEN_FALL, "kl_drift": KL_DRIFT}
"""By the names that ``rules.yaml`` uses."""
DEFAULT_STOP = (f"chosen_delta < {CHOSEN_FALL}", f"kl > {KL_DRIFT}")
"""When stage 2 stops."""
ALIASES = {"chosen_delta": "delta_logp/chosen"}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_RULE = re.compile(r"\s*([A-Za-z0-9_/.-]+?)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Rule:
    """``reading`` (its full name) compared with ``threshold``, in the reading's own unit."""

    text: str
    reading: str
    comparison: str
    threshold: float

    def holds(self, value: float | None) -> bool:
        """Whether a value meets the rule; a missing one never does."""
        return value is not None and bool(_COMPARE[self.comparison](value, self.threshold))


def parse_rule(text: str, probes: Iterable[Mapping[str, Any]] = ()) -> Rule:
    """Read ``NAME < NUMBER`` (or ``<=``, ``>``, ``>=``).

    Args:
        probes: probes beside the shipped ones, as in ``probes.extra``; their readings may be named too.

    Raises:
        RecipeError: another form, a name that no probe writes (the nearest is named), or no finite number.
    """
    match = _RULE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise RecipeError(f"stop: {text!r} is no rule; write NAME < NUMBER, e.g. {DEFAULT_STOP[0]!r}")
    name, comparison, number = match.groups()
    reading = ALIASES.get(name, name)
    known = known_readings(probes)
    if not any(_is_named(reading, one) for one in known):
        names = (*ALIASES, *(f"{one}TYPE" if one.endswith("/") else one for one in known))
        raise RecipeError(
            f"stop: {text!r}: no reading {name!r}{nearest(name, names)}; known: {', '.join(names)}"
        )
    try:
        threshold = float(number)
    except ValueError:
        threshold = float("nan")
    if not abs(threshold) < float("inf"):
        raise RecipeError(f"stop: {text!r}: {number!r} is no finite number")
    return Rule(text.strip(), reading, comparison, threshold)


def _is_named(reading: str, known: str) -> bool:
    return reading.startswith(known) and reading != known if known.endswith("/") else reading == known


@dataclass(frozen=True)
class Violation:
    """A rule that held, with the reading that met it."""

    rule: Rule
    value: float
    n: int
    step: int

    def words(self) -> str:
        """One sentence for log, report and model card."""
        return (
            f"{self.rule.text}: {self.rule.reading} was {self.value:.4g} (n = {self.n}) at step {self.step}"
        )


def first_violation(rules: Iterable[Rule], readings: Mapping[str, Any]) -> Violation | None:
    """The first rule, in their order, that a step's readings meet.

    Args:
        readings: name -> an object with ``value``, ``n`` and ``step`` (:class:`cwdpo.records.Reading`).
    """
    for rule in rules:
        reading = readings.get(rule.reading)
        if reading is not None and rule.holds(reading.value):
            return Violation(rule, reading.value, reading.n, reading.step)
    return None
