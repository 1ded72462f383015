"""Rules about readings, such as ``kl > 0.05``; parsed, not executed as code. Does not import torch.

A bound may be a share of the entropy that the policy has at the start of the stage: ``kl > 0.133 of entropy``. A policy
with many words to choose from moves further before its responses are damaged (docs/decisions.md).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cwdpo.errors import RecipeError, nearest
from cwdpo.probes.base import known_readings

LEAST_ENTROPY = 0.3
"""Nats per token that a share is of if the policy's entropy is less or was not measured: the entropy in the embedded
world, where the bounds were measured."""
CHOSEN_FALL = -0.067
"""Lower bound for ``delta_logp/chosen``, as a share of the entropy (chosen by measurement, see docs/decisions.md)."""
KL_DRIFT = 0.133
"""Upper bound for ``kl``, as a share of the entropy."""
THRESHOLDS = {"chosen_fall": CHOSEN_FALL, "kl_drift": KL_DRIFT}
"""The bounds by the names that ``rules.yaml`` uses."""
DEFAULT_STOP = (f"chosen_delta < {CHOSEN_FALL} of entropy", f"kl > {KL_DRIFT} of entropy")
"""The default stopping rules of stage 2."""
ALIASES = {"chosen_delta": "delta_logp/chosen"}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_RULE = re.compile(r"\s*([A-Za-z0-9_/.-]+?)\s*(<=|>=|<|>)\s*(\S+)(\s+of\s+entropy)?\s*")


def in_nats(share: float, entropy: float | None) -> float:
    """A share of the entropy (nats per token) at the start of a stage; see :data:`LEAST_ENTROPY`."""
    return share * max(entropy or 0.0, LEAST_ENTROPY)


@dataclass(frozen=True)
class Rule:
    """``reading`` (its full name) compared with ``threshold``, in its own unit or as a share of the entropy."""

    text: str
    reading: str
    comparison: str
    threshold: float
    of_entropy: bool = False

    def bound(self, entropy: float | None = None) -> float:
        """The threshold in the reading's unit; ``entropy``: at the start of the stage, nats per token."""
        return in_nats(self.threshold, entropy) if self.of_entropy else self.threshold

    def holds(self, value: float | None, entropy: float | None = None) -> bool:
        """Whether the rule holds for a value; it never holds for a missing one."""
        return value is not None and bool(_COMPARE[self.comparison](value, self.bound(entropy)))


def parse_rule(text: str, probes: Iterable[Mapping[str, Any]] = ()) -> Rule:
    """Parse ``NAME < NUMBER`` (or ``<=``, ``>``, ``>=``), or ``NAME < NUMBER of entropy``.

    Args:
        text: the rule.
        probes: further probes, as in ``probes.extra``, whose readings the rule may name.

    Raises:
        RecipeError: the text has another form, NAME is not a reading (the nearest one is named), or NUMBER is not a
            finite number.
    """
    match = _RULE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise RecipeError(
            f"stop: {text!r} is not a rule; write NAME < NUMBER, or NAME < NUMBER of entropy, e.g. {DEFAULT_STOP[0]!r}"
        )
    name, comparison, number, share = match.groups()
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
    return Rule(text.strip(), reading, comparison, threshold, share is not None)


def _is_named(reading: str, known: str) -> bool:
    return reading.startswith(known) and reading != known if known.endswith("/") else reading == known


@dataclass(frozen=True)
class Violation:
    """A rule that held, with the reading for which it held, and its bound in the reading's unit."""

    rule: Rule
    value: float
    n: int
    step: int
    bound: float

    def words(self) -> str:
        """The violation in one sentence, for log, report and model card."""
        bound = f" ({self.bound:.3g})" if self.rule.of_entropy else ""
        return f"{self.rule.text}{bound}: {self.rule.reading} was {self.value:.4g} (n = {self.n}) at step {self.step}"


def first_violation(
    rules: Iterable[Rule], readings: Mapping[str, Any], entropy: float | None = None
) -> Violation | None:
    """The first rule that holds for a step's readings, or ``None``.

    Args:
        rules: checked in this order.
        readings: by name, objects with ``value``, ``n`` and ``step`` (:class:`cwdpo.records.Reading`).
        entropy: at the start of the stage, nats per token.
    """
    for rule in rules:
        reading = readings.get(rule.reading)
        if reading is not None and rule.holds(reading.value, entropy):
            return Violation(rule, reading.value, reading.n, reading.step, rule.bound(entropy))
    return None
