"""Rules about readings, such as ``chosen_delta < -0.02``; parsed, not executed as code. Does not import torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cwdpo.errors import RecipeError, nearest
from cwdpo.probes.base import known_readings

CHOSEN_FALL = -0.02
"""Lower bound for ``delta_logp/chosen``, in nats per token (chosen by measurement, see docs/decisions.md)."""
KL_DRIFT = 0.04
"""Upper bound for ``kl``, in nats per token."""
THRESHOLDS = {"chosen_fall": CHOSEN_FALL, "kl_drift": KL_DRIFT}
"""The bounds by the names that ``rules.yaml`` uses."""
DEFAULT_STOP = (f"chosen_delta < {CHOSEN_FALL}", f"kl > {KL_DRIFT}")
"""The default stopping rules of stage 2."""
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
        """Whether the rule holds for a value; it never holds for a missing one."""
        return value is not None and bool(_COMPARE[self.comparison](value, self.threshold))


def parse_rule(text: str, probes: Iterable[Mapping[str, Any]] = ()) -> Rule:
    """Parse ``NAME < NUMBER`` (or ``<=``, ``>``, ``>=``).

    Args:
        text: the rule.
        probes: further probes, as in ``probes.extra``, whose readings the rule may name.

    Raises:
        RecipeError: the text has another form, NAME is not a reading (the nearest one is named), or NUMBER is not a
            finite number.
    """
    match = _RULE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise RecipeError(f"stop: {text!r} is not a rule; write NAME < NUMBER, e.g. {DEFAULT_STOP[0]!r}")
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
        raise RecipeError(f"stop: {text!r}: {number!r} is not a finite number")
    return Rule(text.strip(), reading, comparison, threshold)


def _is_named(reading: str, known: str) -> bool:
    return reading.startswith(known) and reading != known if known.endswith("/") else reading == known


@dataclass(frozen=True)
class Violation:
    """A rule that held, with the reading for which it held."""

    rule: Rule
    value: float
    n: int
    step: int

    def words(self) -> str:
        """The violation in one sentence, for log, report and model card."""
        return (
            f"{self.rule.text}: {self.rule.reading} was {self.value:.4g} (n = {self.n}) at step {self.step}"
        )


def first_violation(rules: Iterable[Rule], readings: Mapping[str, Any]) -> Violation | None:
    """The first rule that holds for a step's readings, or ``None``.

    Args:
        rules: checked in this order.
        readings: by name, objects with ``value``, ``n`` and ``step`` (:class:`cwdpo.records.Reading`).
    """
    for rule in rules:
        reading = readings.get(rule.reading)
        if reading is not None and rule.holds(reading.value):
            return Violation(rule, reading.value, reading.n, reading.step)
    return None
