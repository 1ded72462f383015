"""The first section of a run's page: diagnosis, gauges and the charts that show squeezing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cwdpo.dynamics.diagnose import Finding, diagnose_rows
from cwdpo.dynamics.rules import CHOSEN_FALL, KL_DRIFT, in_nats
from cwdpo.dynamics.series import Point, Series
from cwdpo.report._page import Folder, Panels
from cwdpo.report._text import finite, number, plain
from cwdpo.report.figures import Line

# label, series, limit, unit, help text
GAUGES = (
    ("Δ log p of chosen", "delta_logp/chosen", CHOSEN_FALL, "nats/token", "chosen must not become less likely"),
    ("KL to the reference", "kl", KL_DRIFT, "nats/token", "how far the policy is from the start of stage 2"),
    ("Negatives cooled", "cooling/cooled", 0.9, "share", "with a weight below 0.1: they have almost no gradient"),
    ("Gradient from easy negatives", "train/gradient/easy_share", 0.7, "share of the rejected side's", "not useful"),
    ("Saturated pairs", "train/gradient/saturated", 0.7, "share", "a above 0.99: nothing left to learn from them"),
    ("Vulnerable pairs", "train/gradient/vulnerable", 0.7, "share", "a from 0.8 to 0.99: small loss, large residuals"),
)  # fmt: skip
_OF_ENTROPY = ("delta_logp/chosen", "kl")
"""Series whose limit is a share of the entropy."""
_FULL = 1.5
"""A gauge is full at this many times its limit."""


@dataclass(frozen=True)
class Gauge:
    """One number shown as a bar with its limit; ``filled`` and ``mark`` are percentages of the bar."""

    label: str
    value: str
    note: str
    help: str
    limit: str
    beyond: bool
    filled: int
    mark: int = round(100 / _FULL)


def dynamics(
    folder: Folder, readings: list[dict[str, Any]], metrics: list[dict[str, Any]], names: Iterator[str]
) -> dict[str, Any]:
    """The values for the template: findings, gauges, and the charts that show squeezing."""
    series = Series(readings, metrics)
    entropy = series.entropy("stage2")
    findings = diagnose_rows(readings, metrics)
    panels = Panels(names)
    types = [n for n in series.names("stage2") if n.startswith("delta_logp/")]
    types.sort(key=lambda n: (n != "delta_logp/chosen", n))
    squeeze = [
        _line(series, "delta_logp/chosen", "chosen", 0),
        _line(series, "argmax_logp", "the policy's most likely tokens", 1, change=True),
    ]
    panels.add(
        "Chosen and the policy's most likely tokens",
        "nats per token since the start: chosen must not fall while the other rises",
        squeeze,
        limit=in_nats(CHOSEN_FALL, entropy),
    )
    panels.add(
        "Δ log p by response type", "nats per token since the start",
        [_line(series, n, n.removeprefix("delta_logp/"), i) for i, n in enumerate(types)],
    )  # fmt: skip
    panels.add(
        "KL to the reference",
        "nats per token, on chosen",
        [_line(series, "kl", "KL", 0)],
        legend=False,
        limit=in_nats(KL_DRIFT, entropy),
    )
    shares = ("rejected_share", "easy_share", "vulnerable", "saturated")
    panels.add(
        "Where the gradient comes from", "shares, in training",
        [_line(series, f"train/gradient/{n}", n.replace("_", " "), i) for i, n in enumerate(shares)], whole=True,
    )  # fmt: skip
    stops = [s for stage in ("stage1", "stage2") if (s := folder.json(f"stopped-{stage}.json"))]
    return {
        "measured": bool(readings),
        "healthy": not findings,
        "gravest": findings[0].severity if findings else "",
        "findings": [_shown(f) for f in findings],
        "stops": [plain(s.get("reason")) for s in stops],
        "gauges": [g for row in GAUGES if (g := _gauge(series, entropy, *row)) is not None],
        "panels": panels.found,
        "cost": _cost(folder),
        "step": series.last_step("stage2"),
    }


def _line(series: Series, name: str, label: str, slot: int, *, change: bool = False) -> Line:
    seen = series.viewed("stage2", name, "change" if change else "value")
    return Line(label, slot, [float(s) for s, _ in seen], [v for _, v in seen])


def _gauge(
    series: Series, entropy: float | None, label: str, name: str, limit: float, unit: str, text: str
) -> Gauge | None:
    points: list[Point] = series.points("stage2", name)
    if not points:
        return None
    if name in _OF_ENTROPY:
        limit = in_nats(limit, entropy)
    last = points[-1]
    ratio = max(last.value / limit, 0.0)
    n = f", n = {last.n}" if last.n else ""
    return Gauge(
        label, number(last.value), f"{unit}{n}, step {last.step}", text, number(limit, None), ratio > 1,
        round(100 * min(ratio, _FULL) / _FULL),
    )  # fmt: skip


def _shown(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "title": finding.title,
        "severity": finding.severity,
        "where": f"{finding.stage.replace('stage', 'stage ')}, from step {finding.first_step}",
        "evidence": finding.evidence,
        "advice": finding.advice,
        "source": finding.source,
    }


def _cost(folder: Folder) -> str:
    """The share of measurements in the time of each stage, as a text."""
    rows = [r for r in folder.rows("timings.jsonl") if finite(r.get("probe_share")) is not None]
    last = {plain(r.get("stage")): r for r in rows}
    return "; ".join(
        f"{100 * row['probe_share']:.1f}% of {stage.replace('stage', 'stage ')} "
        f"({plain(row.get('probe_responses'))} responses each time)"
        for stage, row in sorted(last.items())
    )
