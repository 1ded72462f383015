"""What early stopping is worth: the judged score where the rule stops, at the end, and at the best measurement.

``python -m cwdpo.lab.stopping_study --seeds 3 --workers 2 --out runs/stopping``

Healthy, hot and long runs of three methods go to their end and are judged at every measurement, so any thresholds can
be tried on them afterwards. They are chosen on one half of the runs and reported on the other.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.dynamics.rules import DEFAULT_STOP, Rule, parse_rule
from cwdpo.evaluation.intervals import mean_interval
from cwdpo.lab.demo import Progress
from cwdpo.lab.grid import run_grid
from cwdpo.lab.scenarios import Scenario, job_of
from cwdpo.lab.traced import halves, run_traced, scores, shared_test, training_steps
from cwdpo.rundir import RunDir, write_json, write_text

METHODS = ("cw_dpo", "dpo", "dpo_sft")
CHOSEN = (-0.005, -0.01, -0.02, -0.03, -0.05, -0.1)
KL = (0.01, 0.02, 0.03, 0.04, 0.06, 0.1)
ALLOWED_COST = 0.005
"""What a rule may cost a healthy run, of judged score."""


@dataclass(frozen=True)
class Trajectory:
    """A run to its end: (step, score) and the readings that rules look at, by name and step."""

    key: str
    group: str
    trace: list[tuple[int, float]]
    readings: dict[str, dict[int, float | None]]

    def stopped(self, rules: Sequence[Rule]) -> int:
        """Index into the trace where rules would have left the run: before the first violation, or at the end."""
        for i, (step, _) in enumerate(self.trace):
            if any(rule.holds(self.readings.get(rule.reading, {}).get(step)) for rule in rules):
                return max(i - 1, 0)
        return len(self.trace) - 1


def scenarios() -> list[tuple[str, Scenario]]:
    """(group, scenario) of every run but its seed."""
    found = []
    for name in METHODS:
        found.append(("healthy", Scenario(f"stop_healthy_{name}", method=name)))
        found.append(("hot", Scenario(f"stop_hot_{name}", method=name, rate_factor=8.0)))
        found.append(
            ("long", Scenario(f"stop_long_{name}", method=name, sections={"stage2": {"steps": 300}}))
        )
    return found


def load(key: str, group: str, folder: Path) -> Trajectory:
    """Read a finished cell."""
    run = RunDir(folder)
    readings: dict[str, dict[int, float | None]] = {}
    for row in run.readings():
        if row["stage"] == "stage2":
            readings.setdefault(row["name"], {})[row["step"]] = row["value"]
    return Trajectory(key, group, scores(run.json("figures.json")), readings)


def outcome(runs: Sequence[Trajectory], rules: Sequence[Rule]) -> dict[str, Any]:
    """Scores by group: at the stop, at the end, at the best measurement in hindsight; differences paired by run."""
    groups: dict[str, Any] = {}
    for group in (*dict.fromkeys(r.group for r in runs), "all"):
        own = [r for r in runs if group in (r.group, "all")]
        at = [r.trace[r.stopped(rules)][1] for r in own]
        end = [r.trace[-1][1] for r in own]
        best = [max(score for _, score in r.trace) for r in own]
        groups[group] = {
            "runs": len(own),
            "stopped_early": sum(r.stopped(rules) < len(r.trace) - 1 for r in own),
            "stop": mean_interval(at),
            "end": mean_interval(end),
            "best": mean_interval(best),
            "gain_over_end": mean_interval([a - e for a, e in zip(at, end, strict=True)]),
            "short_of_best": mean_interval([b - a for a, b in zip(at, best, strict=True)]),
            "worst_cost": max((e - a for a, e in zip(at, end, strict=True)), default=None),
        }
    return groups


def choose(runs: Sequence[Trajectory]) -> tuple[str, str]:
    """The pair of thresholds with the best mean score at the stop whose mean cost to healthy runs is allowed.

    The defaults come first, so that a tie leaves them.
    """
    pairs = [DEFAULT_STOP, *((f"chosen_delta < {c}", f"kl > {k}") for c, k in itertools.product(CHOSEN, KL))]

    def value(pair: tuple[str, str]) -> float:
        groups = outcome(runs, [parse_rule(text) for text in pair])
        cost = -groups["healthy"]["gain_over_end"]["mean"] if "healthy" in groups else 0.0
        return float("-inf") if cost > ALLOWED_COST else float(groups["all"]["stop"]["mean"])

    return max(pairs, key=value)


def markdown(title: str, groups: Mapping[str, Any]) -> str:
    """A table of the study."""
    head = (
        "runs",
        "n",
        "stopped early",
        "at the stop",
        "at the end",
        "best in hindsight",
        "stop - end",
        "worst cost",
    )
    lines = [f"\n### {title}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, g in groups.items():
        means = " | ".join(f"{g[k]['mean']:.3f}" for k in ("stop", "end", "best"))
        gain = g["gain_over_end"]
        interval = "" if gain["low"] is None else f" [{gain['low']:.3f}, {gain['high']:.3f}]"
        lines.append(
            f"| {name} | {g['runs']} | {g['stopped_early']} | {means} | {gain['mean']:+.3f}{interval} | "
            f"{g['worst_cost']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def study(out: Path, seeds: int, workers: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run what is not there yet, choose on one half, report on the other."""
    test = shared_test(out)
    wanted = [(group, s, i) for group, s in scenarios() for i in range(seeds) if not only or s.name in only]
    # Healthy runs decide whether a rule costs anything: one seed more of each.
    wanted += [
        (group, s, seeds) for group, s in scenarios() if group == "healthy" and (not only or s.name in only)
    ]
    jobs = {(s.name, i): job_of(s, i, out, test) for _, s, i in wanted}
    progress = Progress(training_steps(list(jobs.values())))
    try:
        results = run_grid([list(jobs.values())], workers, progress, run_traced)
    finally:
        progress.stop()
    runs = {}
    for group, s, i in wanted:
        job = jobs[s.name, i]
        if results[job.key].status == "done":
            runs[job.key] = load(job.key, group, job.folder)
    tuning, reporting = ([runs[k] for k in half] for half in halves(list(runs)))
    chosen = choose(tuning)
    summary: dict[str, Any] = {
        "failed": {k: r.error for k, r in results.items() if r.status == "failed"},
        "chosen": list(chosen),
        "default": {
            "rules": list(DEFAULT_STOP),
            "reporting": outcome(reporting, [parse_rule(t) for t in DEFAULT_STOP]),
        },
        "reporting": outcome(reporting, [parse_rule(t) for t in chosen]),
        "tuning": outcome(tuning, [parse_rule(t) for t in chosen]),
    }
    write_json(out / "stopping.json", summary)
    text = markdown(f"Default: {', '.join(DEFAULT_STOP)}", summary["default"]["reporting"])
    text += markdown(f"Chosen on the other half: {', '.join(chosen)}", summary["reporting"])
    write_text(out / "stopping.md", text)
    return summary


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/stopping"))
    parser.add_argument(
        "--seeds", type=int, default=3, help="of each of nine kinds of run, and one more of healthy ones"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=(), help="names of scenarios")
    args = parser.parse_args()
    study(args.out, args.seeds, args.workers, args.only)
    print((args.out / "stopping.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
