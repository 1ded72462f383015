"""Named findings from a run's numbers. The rules are data (``rules.yaml``); this reads them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cwdpo.dynamics.rules import THRESHOLDS
from cwdpo.dynamics.series import Series, View
from cwdpo.errors import RecipeError
from cwdpo.registry import Settings, explain
from cwdpo.rundir import RunDir

Severity = Literal["critical", "warning", "note"]
ORDER: dict[str, int] = {"critical": 0, "warning": 1, "note": 2}


class Condition(Settings):
    """One comparison; exactly one of ``above`` and ``below`` is given.

    ``series`` is a reading's name, or ``train/`` and a metric's; ``after`` a share of the stage's steps before
    which the condition does not count; see :meth:`Series.viewed` for ``view`` and ``window``.
    """

    series: str
    view: View = "value"
    above: float | None = None
    below: float | None = None
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
        """The bound."""
        return self.above if self.above is not None else float(self.below)  # type: ignore[arg-type]

    def holds(self, value: float) -> bool:
        """Whether a number is beyond the bound."""
        return value > self.threshold if self.above is not None else value < self.threshold

    def scaled(self, factor: float) -> Condition:
        """The same with its bound moved, for choosing thresholds."""
        name = "above" if self.above is not None else "below"
        return self.model_copy(update={name: self.threshold * factor})

    def words(self, value: float, step: int) -> str:
        """What was seen, in one line."""
        view = {
            "value": "", "change": " since the start of the stage", "fall": " below its highest",
            "rise": " above its lowest", "width": " (half of its 95% interval)",
            "low": " (lower end of its 95% interval)", "n": " (n)",
        }[self.view]  # fmt: skip
        sign = "above" if self.above is not None else "below"
        return f"{self.series}{view}: {value:.4g} at step {step}, {sign} {self.threshold:g}"


class FindingRule(Settings):
    """A finding: all of ``when`` must hold at one step. Several rules may share a name; the earliest speaks.

    ``tuned`` lists the conditions (by position) whose bounds a study may move.
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
        """The rule with its tuned bounds moved by a factor."""
        moved = [c.scaled(factor) if i in self.tuned else c for i, c in enumerate(self.when)]
        return self.model_copy(update={"when": tuple(moved)})


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        first_step: the first step of the stage at which all of its conditions held.
        last_step: the last such step.
        evidence: per condition, what was seen at ``first_step``.
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
        """For ``cwdpo diagnose --json``."""
        return {**vars(self), "evidence": list(self.evidence)}


def load_rules(text: str | None = None, where: str = "rules.yaml") -> list[FindingRule]:
    """The package's rules, or those of a text.

    Raises:
        RecipeError: a rule that is not one; the key is named.
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
    """What a rule finds in a run; a series that was not recorded meets no condition."""
    seen = [dict(_counted(c, series, rule.stage)) for c in rule.when]
    steps = sorted({step for values in seen for step in values})
    held: list[tuple[int, list[tuple[int, float]]]] = []
    for step in steps:
        # Readings and metrics have steps of their own: each condition is asked for its latest number.
        latest = [max((s for s in values if s <= step), default=None) for values in seen]
        if any(s is None for s in latest):
            continue
        now = [(s, values[s]) for s, values in zip(latest, seen, strict=True) if s is not None]
        if all(c.holds(value) for c, (_, value) in zip(rule.when, now, strict=True)):
            held.append((step, now))
    if not held:
        return None
    first, now = held[0]
    evidence = tuple(c.words(value, step) for c, (step, value) in zip(rule.when, now, strict=True))
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
    """Findings in the rows of a run, the gravest first, then the earliest; one of each name."""
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
    """The JSON of a diagnosis: ``{"findings": [...], "healthy": bool}``; any finding makes a run not healthy."""
    return {"findings": [f.to_json() for f in findings], "healthy": not findings}
