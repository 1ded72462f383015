"""How well the diagnosis finds what was provoked, and how often it cries wolf.

``python -m cwdpo.lab.findings_study --seeds 3 --healthy-seeds 7 --workers 2 --out runs/findings``

Every scenario of :mod:`cwdpo.lab.scenarios` is run with each seed and judged at every measurement; finished cells
are kept. Bounds of the rules are tried at :data:`FACTORS` times their shipped values on one half of the runs, and the
table is made on the other half, with the shipped bounds and with the chosen ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.dynamics.diagnose import Finding, FindingRule, diagnose_rows, load_rules
from cwdpo.lab.demo import Progress
from cwdpo.lab.grid import run_grid
from cwdpo.lab.scenarios import HEALTHY, PROVOKED, Scenario, job_of
from cwdpo.lab.traced import damage_step, halves, run_traced, scores, shared_test, training_steps
from cwdpo.rundir import RunDir, write_json, write_text

FACTORS = (1.0, 0.7, 1.4, 0.5, 2.0)
"""Tried for each finding's bounds; on a tie the first counts, so a bound moves only where that pays."""
FALSE_COSTS = 2.0
"""A share of false alarms weighs so many times as much as the same share of missed ones."""


@dataclass(frozen=True)
class Run:
    """A finished cell: its rows, and its judged scores by step."""

    key: str
    scenario: Scenario
    readings: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    trace: list[tuple[int, float]]

    def findings(self, rules: Sequence[FindingRule]) -> list[Finding]:
        """What rules find here."""
        return diagnose_rows(self.readings, self.metrics, rules)


def load_run(key: str, scenario: Scenario, folder: Path) -> Run:
    """Read a finished cell."""
    run = RunDir(folder)
    return Run(key, scenario, run.readings(), run.metrics(), scores(run.json("figures.json")))


def choose(runs: Sequence[Run], rules: Sequence[FindingRule]) -> dict[str, float]:
    """The factor of each finding's bounds that tells these runs apart best."""
    chosen = {}
    for name in sorted({r.name for r in rules}):
        own = [r for r in rules if r.name == name]
        meant = [r for r in runs if name in r.scenario.provokes]
        healthy = [r for r in runs if not r.scenario.provokes]

        def value(factor: float, own: Any = own, meant: Any = meant, healthy: Any = healthy) -> float:
            moved = [r.scaled(factor) for r in own]
            found, false = (
                sum(bool(r.findings(moved)) for r in some) / max(len(some), 1) for some in (meant, healthy)
            )
            return found - FALSE_COSTS * false

        chosen[name] = max(FACTORS, key=value)
    return chosen


def with_factors(rules: Sequence[FindingRule], factors: Mapping[str, float]) -> list[FindingRule]:
    """The rules with their bounds moved."""
    return [r.scaled(factors.get(r.name, 1.0)) for r in rules]


def table(runs: Sequence[Run], rules: Sequence[FindingRule]) -> dict[str, Any]:
    """Detections by scenario, false alarms of healthy runs, and how early the first alarm came.

    A note is no alarm. ``lead``: steps from the first alarm of stage 2 to the first damage of the judged score, of the
    runs that were damaged and alarmed; ``lead_critical``: from the first critical finding. ``unseen``: runs that were
    damaged without an alarm, whatever they were meant to be.
    """
    rows: dict[str, dict[str, Any]] = {}
    leads: dict[str, list[int]] = {"lead": [], "lead_critical": []}
    unseen: list[str] = []
    for run in runs:
        found = run.findings(rules)
        alarms = [f for f in found if f.severity != "note"]
        meant = set(run.scenario.provokes)
        row = rows.setdefault(
            run.scenario.name, {"runs": 0, "found": 0, "provokes": sorted(meant), "others": {}}
        )
        row["runs"] += 1
        row["found"] += bool({f.name for f in found} & meant) if meant else bool(alarms)
        for f in found:
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


def markdown(title: str, found: Mapping[str, Any]) -> str:
    """A table of the study."""
    lines = [
        f"\n### {title}\n",
        "| scenario | provokes | found | runs | other findings |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(found["scenarios"].items()):
        others = ", ".join(f"{k} {v}" for k, v in sorted(row["others"].items())) or "–"
        word = ", ".join(row["provokes"]) or "nothing (found = false alarms)"
        lines.append(f"| {name} | {word} | {row['found']} | {row['runs']} | {others} |")
    lead, critical = found["lead"], found["lead_critical"]
    lines.append(
        f"\nDetected {found['detected']} of {found['provoked']}; false alarms {found['false']} of {found['healthy']}. "
        f"First alarm before or at the damage in {lead['not_late']} of {lead['n']} damaged runs, median lead "
        f"{lead['median']} steps; first critical finding in {critical['not_late']} of {critical['n']}, median "
        f"{critical['median']}. Damaged without an alarm: {', '.join(found['unseen']) or 'none'}."
    )
    return "\n".join(lines) + "\n"


def study(out: Path, wanted: Sequence[tuple[Scenario, int]], workers: int) -> dict[str, Any]:
    """Run what is not there yet, and make the tables."""
    test = shared_test(out)
    jobs = {(s.name, seed): job_of(s, seed, out, test) for s, seed in wanted}
    progress = Progress(training_steps(list(jobs.values())))
    try:
        results = run_grid([list(jobs.values())], workers, progress, run_traced)
    finally:
        progress.stop()
    runs = {
        jobs[s.name, seed].key: load_run(jobs[s.name, seed].key, s, jobs[s.name, seed].folder)
        for s, seed in wanted
        if results[jobs[s.name, seed].key].status == "done"
    }
    tuning, reporting = halves(list(runs))
    rules = load_rules()
    factors = choose([runs[k] for k in tuning], rules)
    summary: dict[str, Any] = {
        "failed": {k: r.error for k, r in results.items() if r.status == "failed"},
        "factors": factors,
        "shipped": table([runs[k] for k in reporting], rules),
        "chosen": table([runs[k] for k in reporting], with_factors(rules, factors)),
        "tuning": table([runs[k] for k in tuning], with_factors(rules, factors)),
    }
    write_json(out / "findings.json", summary)
    moved = {k: v for k, v in factors.items() if v != 1.0}
    text = markdown("Reporting half, shipped bounds", summary["shipped"])
    text += markdown(
        f"Reporting half, bounds chosen on the other half ({moved or 'none moved'})", summary["chosen"]
    )
    write_text(out / "findings.md", text)
    return summary


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/findings"))
    parser.add_argument("--seeds", type=int, default=3, help="of each provoked scenario")
    parser.add_argument("--healthy-seeds", type=int, default=7, help="of each healthy scenario")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of scenarios")
    args = parser.parse_args()
    scenarios = [(s, args.healthy_seeds) for s in HEALTHY] + [(s, args.seeds) for s in PROVOKED]
    wanted = [(s, i) for s, n in scenarios for i in range(n) if not args.only or s.name in args.only]
    study(args.out, wanted, args.workers)
    print((args.out / "findings.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
