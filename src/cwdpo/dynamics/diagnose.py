"""Applies the rules of ``rules.yaml`` to the readings and metrics of a run. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cwdpo.dynamics.rules import THRESHOLDS, in_nats
from cwdpo.dynamics.series import Series, View
from cwdpo.errors import RecipeError
from cwdpo.registry import Settings, explain
from cwdpo.rundir import RunDir

Severity = Literal["critical", "warning", "note"]
ORDER: dict[str, int] = {"critical": 0, "warning": 1, "note": 2}


class Condition(Settings):
    """One comparison with a bound; exactly one of ``above`` and ``below`` is given.

    Attributes:
        series: name of a reading, or ``train/`` and the name of a training metric.
        view, window: see :meth:`Series.viewed`.
        above, below: the bound, a number or a name of :data:`cwdpo.dynamics.rules.THRESHOLDS`.
        of: ``entropy``: the bound is a share of the policy's entropy at the start of the stage.
        after: share of the stage's steps that the condition skips.
    """

    series: str
    view: View = "value"
    above: float | None = None
    below: float | None = None
    of: Literal["entropy"] | None = None
    after: float = Field(0.0, ge=0, le=1)
    window: int = Field(1, ge=1)

    @field_validator("above", "below", mode="before")
    @classmethod
    def _named(cls, bound: Any) -> Any:
        return THRESHOLDS.get(bound, bound) if isinstance(bound, str) else bound

    @model_validator(mode="after")
    def _one_bound(self) -> Condition:
        if (self.above is None) == (self.below is None):
            raise ValueError("exactly one of 'above' and 'below' must be given")
        return self

    @property
    def threshold(self) -> float:
        """The bound as it is given."""
        return self.above if self.above is not None else float(self.below)  # type: ignore[arg-type]

    def bound(self, entropy: float | None = None) -> float:
        """The bound in the series' unit; ``entropy``: at the start of the stage, nats per token."""
        return in_nats(self.threshold, entropy) if self.of else self.threshold

    def holds(self, value: float, entropy: float | None = None) -> bool:
        """Whether a number is above, or below, the bound."""
        bound = self.bound(entropy)
        return value > bound if self.above is not None else value < bound

    def scaled(self, factor: float) -> Condition:
        """The condition with its bound multiplied by a factor, for choosing thresholds."""
        name = "above" if self.above is not None else "below"
        return self.model_copy(update={name: self.threshold * factor})

    def words(self, value: float, step: int, entropy: float | None = None) -> str:
        """The observed number and the bound, in one line."""
        view = {
            "value": "", "change": " since the start of the stage", "fall": " below its highest",
            "rise": " above its lowest", "width": " (half of its 95% interval)",
            "low": " (lower end of its 95% interval)", "n": " (n)",
        }[self.view]  # fmt: skip
        sign = "above" if self.above is not None else "below"
        share = f" ({self.threshold:g} of the entropy)" if self.of else ""
        return f"{self.series}{view}: {value:.4g} at step {step}, {sign} {self.bound(entropy):.3g}{share}"


class FindingRule(Settings):
    """A rule that gives a finding when all conditions of ``when`` hold at the same step.

    If several rules have the same name, the finding with the earliest step is reported. ``tuned`` lists the indices of
    the conditions whose bounds a study may change.
    """

    name: str
    title: str
    severity: Severity
    stage: Literal["stage1", "stage2"] = "stage2"
    when: tuple[Condition, ...] = Field(min_length=1)
    source: str
    advice: str
    tuned: tuple[int, ...] = (0,)

    def scaled(self, factor: float) -> FindingRule:
        """The rule with its tuned bounds multiplied by a factor."""
        moved = [c.scaled(factor) if i in self.tuned else c for i, c in enumerate(self.when)]
        return self.model_copy(update={"when": tuple(moved)})


@dataclass(frozen=True)
class Finding:
    """The result of a rule whose conditions held.

    Attributes:
        first_step: the first step of the stage at which all conditions held.
        last_step: the last such step.
        evidence: one line per condition, with the number observed at ``first_step``.
    """

    name: str
    title: str
    severity: Severity
    stage: str
    first_step: int
    last_step: int
    evidence: tuple[str, ...]
    advice: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON, for ``cwdpo diagnose --json``."""
        return {**vars(self), "evidence": list(self.evidence)}


def load_rules(text: str | None = None, where: str = "rules.yaml") -> list[FindingRule]:
    """The shipped rules, or the rules in a YAML text.

    Args:
        text: YAML like ``rules.yaml``; ``None`` loads the shipped rules.
        where: name of the text's file, for error messages.

    Raises:
        RecipeError: an invalid rule; the message names the key.
    """
    if text is None:
        text = resources.files("cwdpo.dynamics").joinpath("rules.yaml").read_text(encoding="utf-8")
    rules = []
    for row in yaml.safe_load(text):
        try:
            rules.append(FindingRule.model_validate(row))
        except ValidationError as error:
            raise RecipeError(
                explain(error, f"{where}: {row.get('name')}", FindingRule.model_fields)
            ) from None
    return rules


def apply(rule: FindingRule, series: Series) -> Finding | None:
    """The finding of a rule in a run, or ``None``; a condition on a series that was not recorded never holds."""
    seen = [dict(_counted(c, series, rule.stage)) for c in rule.when]
    entropy = series.entropy(rule.stage)
    steps = sorted({step for values in seen for step in values})
    held: list[tuple[int, list[tuple[int, float]]]] = []
    for step in steps:
        # Readings and metrics are recorded at different steps, so each condition uses its latest number.
        latest = [max((s for s in values if s <= step), default=None) for values in seen]
        if any(s is None for s in latest):
            continue
        now = [(s, values[s]) for s, values in zip(latest, seen, strict=True) if s is not None]
        if all(c.holds(value, entropy) for c, (_, value) in zip(rule.when, now, strict=True)):
            held.append((step, now))
    if not held:
        return None
    first, now = held[0]
    evidence = tuple(c.words(value, step, entropy) for c, (step, value) in zip(rule.when, now, strict=True))
    return Finding(
        rule.name,
        rule.title,
        rule.severity,
        rule.stage,
        first,
        held[-1][0],
        evidence,
        rule.advice,
        rule.source,
    )


def _counted(condition: Condition, series: Series, stage: str) -> Iterable[tuple[int, float]]:
    begin = condition.after * series.last_step(stage)
    seen = series.viewed(stage, condition.series, condition.view, condition.window)
    return [(step, value) for step, value in seen if step >= begin]


def diagnose_rows(
    readings: Iterable[Mapping[str, Any]],
    metrics: Iterable[Mapping[str, Any]],
    rules: Sequence[FindingRule] | None = None,
) -> list[Finding]:
    """Findings in the rows of a run: at most one per name, the most severe first, then the earliest."""
    series = Series(readings, metrics)
    found: dict[str, Finding] = {}
    for rule in load_rules() if rules is None else rules:
        finding = apply(rule, series)
        if finding is not None and (
            rule.name not in found or finding.first_step < found[rule.name].first_step
        ):
            found[rule.name] = finding
    return sorted(found.values(), key=lambda f: (ORDER[f.severity], f.stage, f.first_step, f.name))


def diagnose(run: RunDir) -> list[Finding]:
    """Findings in a run folder, finished or not."""
    return diagnose_rows(run.readings(), run.metrics())


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The JSON of a diagnosis: ``{"findings": [...], "healthy": bool}``; a run without findings is healthy."""
    return {"findings": [f.to_json() for f in findings], "healthy": not findings}
