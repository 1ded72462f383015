"""Rules over readings, such as ``chosen_delta < -0.02``: read, never evaluated as code. No torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cwdpo.errors import RecipeError, nearest

DEFAULT_STOP = ("chosen_delta < -0.02", "kl > 0.04")
"""When stage 2 stops, nats per token: the alarms that came before a drop of the judged score (docs/decisions.md)."""
ALIASES = {"chosen_delta": "delta_logp/chosen"}
READINGS = (
    "delta_logp/chosen", "chosen_shift", "rejected_shift", "margin", "accuracy", "nll", "entropy", "top1",
    "argmax_logp", "tv", "js", "kl", "ece", "cooling/cooled", "cooling/floor_gap", "cooling/tau_gap",
    "gradient/vulnerable", "gradient/rejected_share", "length/ratio", "length/correlation", "influence/sign",
    "influence/correlation", "influence/A", "influence/G",
)  # fmt: skip
"""Readings with a fixed name; those that end in a response type begin with one of :data:`PREFIXES`."""
PREFIXES = (
    "delta_logp/", "cooling/weight/", "cooling/origin/", "gradient/residual/", "tv/", "js/", "kl/", "repetition/",
    "ended/", "influence/K/",
)  # fmt: skip
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


def parse_rule(text: str) -> Rule:
    """Read ``NAME < NUMBER`` (or ``<=``, ``>``, ``>=``).

    Raises:
        RecipeError: another form, a name that no probe writes (the nearest is named), or no finite number.
    """
    found = _RULE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise RecipeError(f"stop: {text!r} is no rule; write NAME < NUMBER, e.g. {DEFAULT_STOP[0]!r}")
    name, comparison, number = found.groups()
    reading = ALIASES.get(name, name)
    known_prefix = any(reading.startswith(p) and reading != p for p in PREFIXES)
    if reading not in READINGS and not known_prefix:
        known = (*ALIASES, *READINGS, *(f"{p}TYPE" for p in PREFIXES))
        raise RecipeError(
            f"stop: {text!r}: no reading {name!r}{nearest(name, known)}; known: {', '.join(known)}"
        )
    try:
        threshold = float(number)
    except ValueError:
        threshold = float("nan")
    if not abs(threshold) < float("inf"):
        raise RecipeError(f"stop: {text!r}: {number!r} is no finite number")
    return Rule(text.strip(), reading, comparison, threshold)


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
