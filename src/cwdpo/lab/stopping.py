"""The effect of early stopping: judged scores at the stop, at the end, and at the best measurement.

This is the analysis of the study ``stopping``. Every run trains to its end and is judged at every measurement, so any
threshold can be tried afterwards. Thresholds are chosen on one half of the runs and reported on the other half.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from cwdpo.dynamics.rules import DEFAULT_STOP, Rule, parse_rule
from cwdpo.dynamics.series import Series
from cwdpo.evaluation.intervals import mean_interval
from cwdpo.lab.trace import Traced, halves

CHOSEN = (-0.005, -0.01, -0.02, -0.03, -0.05, -0.1)
KL = (0.01, 0.02, 0.03, 0.04, 0.06, 0.1)
ALLOWED_COST = 0.005
"""How much judged score the rules may cost healthy runs, on average."""


def stopped(run: Traced, rules: Sequence[Rule]) -> int:
    """Index in the trace at which the rules would have left the run: before the first violation, or at the end."""
    readings = {(r["name"], r["step"]): r["value"] for r in run.readings if r["stage"] == "stage2"}
    entropy = Series(run.readings, ()).entropy("stage2")
    for i, (step, _) in enumerate(run.trace):
        if any(rule.holds(readings.get((rule.reading, step)), entropy) for rule in rules):
            return max(i - 1, 0)
    return len(run.trace) - 1


def group_of(run: Traced) -> str:
    """The column of the variant in the study's panel: ``healthy``, ``hot``, ..."""
    return run.variant.cell[1] if run.variant.cell else ""


def outcome(runs: Sequence[Traced], rules: Sequence[Rule]) -> dict[str, Any]:
    """For each group, scores at the stop, at the end and at the best measurement; differences are paired by run."""
    groups: dict[str, Any] = {}
    for group in (*dict.fromkeys(map(group_of, runs)), "all"):
        own = [r for r in runs if group in (group_of(r), "all")]
        stops = [stopped(r, rules) for r in own]
        at = [r.trace[stop][1] for r, stop in zip(own, stops, strict=True)]
        end = [r.trace[-1][1] for r in own]
        best = [max(score for _, score in r.trace) for r in own]
        groups[group] = {
            "runs": len(own),
            "stopped_early": sum(stop < len(r.trace) - 1 for r, stop in zip(own, stops, strict=True)),
            "stop": mean_interval(at),
            "end": mean_interval(end),
            "best": mean_interval(best),
            "gain_over_end": mean_interval([a - e for a, e in zip(at, end, strict=True)]),
            "short_of_best": mean_interval([b - a for a, b in zip(at, best, strict=True)]),
            "worst_cost": max((e - a for a, e in zip(at, end, strict=True)), default=None),
        }
    return groups


def choose(runs: Sequence[Traced]) -> tuple[str, str]:
    """The pair of thresholds with the best mean score at the stop, whose cost to healthy runs is allowed.

    The default thresholds come first and win a tie.
    """
    pairs = [DEFAULT_STOP, *((f"chosen_delta < {c}", f"kl > {k}") for c, k in itertools.product(CHOSEN, KL))]

    def value(pair: tuple[str, str]) -> float:
        groups = outcome(runs, [parse_rule(text) for text in pair])
        cost = -groups["healthy"]["gain_over_end"]["mean"] if "healthy" in groups else 0.0
        return float("-inf") if cost > ALLOWED_COST else float(groups["all"]["stop"]["mean"])

    return max(pairs, key=value)


def markdown(title: str, groups: Mapping[str, Any]) -> str:
    """The groups of :func:`outcome` as markdown."""
    lines = [
        f"\n### {title}\n",
        "| runs | n | stopped early | at the stop | at the end | best in hindsight | stop - end | worst cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, g in groups.items():
        means = " | ".join(f"{g[k]['mean']:.3f}" for k in ("stop", "end", "best"))
        gain = g["gain_over_end"]
        interval = "" if gain["low"] is None else f" [{gain['low']:.3f}, {gain['high']:.3f}]"
        lines.append(
            f"| {name} | {g['runs']} | {g['stopped_early']} | {means} | {gain['mean']:+.3f}{interval} | "
            f"{g['worst_cost']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def analyse(runs: Sequence[Traced]) -> tuple[dict[str, Any], str]:
    """The tables as JSON and as markdown: thresholds are chosen on every second run and reported on the others."""
    tuning, reporting = halves(runs)
    chosen = choose(tuning)
    rules, default = ([parse_rule(text) for text in texts] for texts in (chosen, DEFAULT_STOP))
    tables: dict[str, Any] = {
        "chosen": list(chosen),
        "default": {"rules": list(DEFAULT_STOP), "reporting": outcome(reporting, default)},
        "reporting": outcome(reporting, rules),
        "tuning": outcome(tuning, rules),
    }
    text = markdown(f"Default: {', '.join(DEFAULT_STOP)}", tables["default"]["reporting"])
    return tables, text + markdown(f"Chosen on the other half: {', '.join(chosen)}", tables["reporting"])
