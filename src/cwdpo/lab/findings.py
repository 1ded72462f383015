"""Detection rate and false-alarm rate of the diagnosis on runs with a provoked problem and on healthy runs.

This is the analysis of the study ``findings``. On one half of the runs the rules' bounds are tried at :data:`FACTORS`
times their shipped values. The tables are computed on the other half, with the shipped and with the chosen bounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cwdpo.dynamics.diagnose import FindingRule, diagnose_rows, load_rules
from cwdpo.lab.trace import Traced, damage_step, halves

FACTORS = (1.0, 0.7, 1.4, 0.5, 2.0)
"""Factors tried for the bounds of each finding; on a tie the first one is chosen, so that the bound is not changed."""
FALSE_COSTS = 2.0
"""Weight of the false-alarm rate relative to the detection rate."""


def choose(runs: Sequence[Traced], rules: Sequence[FindingRule]) -> dict[str, float]:
    """For each finding, the factor of its bounds that best separates provoked from healthy runs."""
    chosen = {}
    for name in sorted({r.name for r in rules}):
        own = [r for r in rules if r.name == name]
        meant = [r for r in runs if name in r.variant.provokes]
        healthy = [r for r in runs if not r.variant.provokes]

        def value(factor: float, own: Any = own, meant: Any = meant, healthy: Any = healthy) -> float:
            moved = [r.scaled(factor) for r in own]
            detected, alarmed = (
                sum(bool(diagnose_rows(r.readings, r.metrics, moved)) for r in some) / max(len(some), 1)
                for some in (meant, healthy)
            )
            return detected - FALSE_COSTS * alarmed

        chosen[name] = max(FACTORS, key=value)
    return chosen


def with_factors(rules: Sequence[FindingRule], factors: Mapping[str, float]) -> list[FindingRule]:
    """The rules with their bounds multiplied by the factors of their findings."""
    return [r.scaled(factors.get(r.name, 1.0)) for r in rules]


def table(runs: Sequence[Traced], rules: Sequence[FindingRule]) -> dict[str, Any]:
    """Detections by scenario, false alarms of healthy runs, and how early the first alarm came.

    A finding of severity ``note`` is not an alarm. ``lead``: steps from the first alarm of stage 2 to the first damage
    of the judged score, in runs with both; ``lead_critical``: the same for the first critical finding. ``unseen``:
    runs with damage but without an alarm.
    """
    rows: dict[str, dict[str, Any]] = {}
    leads: dict[str, list[int]] = {"lead": [], "lead_critical": []}
    unseen: list[str] = []
    for run in runs:
        raised = diagnose_rows(run.readings, run.metrics, rules)
        alarms = [f for f in raised if f.severity != "note"]
        meant = set(run.variant.provokes)
        row = rows.setdefault(run.name, {"runs": 0, "found": 0, "provokes": sorted(meant), "others": {}})
        row["runs"] += 1
        row["found"] += bool({f.name for f in raised} & meant) if meant else bool(alarms)
        for f in raised:
            if f.name not in meant:
                row["others"][f.name] = row["others"].get(f.name, 0) + 1
        damage = damage_step(run.trace)
        stage2 = [f for f in alarms if f.stage == "stage2"]
        critical = [f for f in stage2 if f.severity == "critical"]
        if damage is not None:
            unseen += [] if stage2 else [run.key]
            for name, some in (("lead", stage2), ("lead_critical", critical)):
                leads[name] += [damage - min(f.first_step for f in some)] if some else []
    provoked = [r for r in rows.values() if r["provokes"]]
    healthy = [r for r in rows.values() if not r["provokes"]]
    return {
        "scenarios": rows,
        "provoked": sum(r["runs"] for r in provoked),
        "detected": sum(r["found"] for r in provoked),
        "healthy": sum(r["runs"] for r in healthy),
        "false": sum(r["found"] for r in healthy),
        **{name: _spread(steps) for name, steps in leads.items()},
        "unseen": unseen,
    }


def _spread(steps: Sequence[int]) -> dict[str, Any]:
    return {
        "n": len(steps),
        "median": statistics.median_low(steps) if steps else None,
        "not_late": sum(step >= 0 for step in steps),
        "all": sorted(steps),
    }


def markdown(title: str, counts: Mapping[str, Any]) -> str:
    """The counts of :func:`table` as markdown."""
    lines = [
        f"\n### {title}\n",
        "| scenario | provokes | found | runs | other findings |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(counts["scenarios"].items()):
        others = ", ".join(f"{k} {v}" for k, v in sorted(row["others"].items())) or "–"
        word = ", ".join(row["provokes"]) or "nothing (found = false alarms)"
        lines.append(f"| {name} | {word} | {row['found']} | {row['runs']} | {others} |")
    lead, critical = counts["lead"], counts["lead_critical"]
    lines.append(
        f"\nDetected {counts['detected']} of {counts['provoked']}; "
        f"false alarms {counts['false']} of {counts['healthy']}. "
        f"First alarm before or at the damage in {lead['not_late']} of {lead['n']} damaged runs, median lead "
        f"{lead['median']} steps; first critical finding in {critical['not_late']} of {critical['n']}, median "
        f"{critical['median']}. Damaged without an alarm: {', '.join(counts['unseen']) or 'none'}."
    )
    return "\n".join(lines) + "\n"


def analyse(runs: Sequence[Traced]) -> tuple[dict[str, Any], str]:
    """The tables as JSON and as markdown: bounds are chosen on every second run, results are from the other runs."""
    tuning, reporting = halves(runs)
    rules = load_rules()
    factors = choose(tuning, rules)
    moved = with_factors(rules, factors)
    tables: dict[str, Any] = {
        "factors": factors,
        "shipped": table(reporting, rules),
        "chosen": table(reporting, moved),
        "tuning": table(tuning, moved),
    }
    named = {name: factor for name, factor in factors.items() if factor != 1.0} or "none moved"
    text = markdown("Reporting half, shipped bounds", tables["shipped"])
    return tables, text + markdown(
        f"Reporting half, bounds chosen on the other half ({named})", tables["chosen"]
    )
