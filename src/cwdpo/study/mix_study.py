"""Where stage 2's negatives come from: dataset, on-policy, mixed, fresh in rounds, and on-policy chosen.

    python -m cwdpo.study.mix_study --out runs/mix-study --seeds 5 --workers 2

Continued SFT, DPO and CW-DPO on the embedded world, each at the settings that the sweep chose, the same base, data
and steps for all. A cell that is finished is not run again, so that the study can be stopped and started at will. It
writes ``mix.md`` (tables with intervals, for docs/decisions.md) and ``mix.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cwdpo.errors import CwdpoError
from cwdpo.evaluation.intervals import mean_interval
from cwdpo.models.load import EMBEDDED
from cwdpo.negatives._settings import NegativeSettings
from cwdpo.rundir import RunDir, write_json, write_text
from cwdpo.study.cell import MAX_NEW_TOKENS, CellJob, StageOfCell
from cwdpo.study.demo import DemoSettings, Progress, write_data
from cwdpo.study.grid import CellResult, run_grid
from cwdpo.study.methods import STAGE1_STEPS, STAGE2_STEPS, Method, cell_recipe, swept_methods

ROUNDS = 3
SHARES = {"dataset": 0.0, "on-policy": 1.0, "mixed": 0.5}
FIGURES = (
    ("sampled_correct", "all correct, T=1", 3),
    ("greedy_correct", "all correct, greedy", 3),
    ("judge_score", "judge score, T=1", 3),
    ("ill_formed", "ill-formed, T=1", 3),
    ("ece", "token ECE", 3),
    ("kl", "KL to stage 1", 4),
    ("delta_logp/chosen", "Δ chosen", 3),
)


@dataclass(frozen=True)
class Arm:
    """A method with its negatives; ``against`` names the arm that it is compared with, seed by seed."""

    method: str
    share: str
    rounds: int
    chosen: bool
    against: str | None

    @property
    def name(self) -> str:
        """Names the arm's cells."""
        return f"{self.method}-{self.share}{'-chosen' if self.chosen else ''}-r{self.rounds}"


def arms() -> list[Arm]:
    """All arms: for SFT, which uses no negative, only what is chosen differs."""
    found = [Arm("sft", "dataset", 1, False, None)]
    found += [Arm("sft", "dataset", r, True, "sft-dataset-r1") for r in (1, ROUNDS)]
    for method in ("dpo", "cw_dpo"):
        base = Arm(method, "dataset", 1, False, "sft-dataset-r1")
        found.append(base)
        for share in ("on-policy", "mixed"):
            one = Arm(method, share, 1, False, base.name)
            found += [one, Arm(method, share, ROUNDS, False, one.name)]
        found += [Arm(method, "mixed", r, True, f"{method}-mixed-r{r}") for r in (1, ROUNDS)]
    return found


def arm_recipe(arm: Arm, recipe: Any, steps: int) -> Any:
    """A cell's recipe with the arm's negatives and number of steps."""
    negatives = NegativeSettings(
        on_policy_fraction=SHARES[arm.share],
        rounds=arm.rounds,
        on_policy_chosen=arm.chosen,
        sampler={"max_new_tokens": MAX_NEW_TOKENS},
    )
    stage2 = recipe.stage2.model_copy(update={"steps": steps})
    return recipe.model_copy(update={"name": arm.name, "negatives": negatives, "stage2": stage2})


def plan(out: Path, seeds: Sequence[int], paths: Mapping[str, str], steps: int) -> list[list[CellJob]]:
    """Two waves: the stage-1 runs that arms share, then every arm on every seed."""
    methods = {m.name: m for m in swept_methods()}
    first: dict[str, CellJob] = {}
    second = []

    def job(key: str, recipe: Any, stage: StageOfCell) -> CellJob:
        return CellJob(key, recipe, out / "cells" / key, Path(paths["test"]), stage)

    for seed in seeds:
        data = paths[f"train{seed}"], paths["validation"]
        for arm in arms():
            m: Method = methods[arm.method]
            shared = f"stage1-{m.stage1['name']}-seed{seed}"
            if shared not in first:
                named = replace(m, name=m.stage1["name"])
                first[shared] = job(shared, cell_recipe(named, seed, *data, str(EMBEDDED)), "stage1")
            recipe = cell_recipe(m, seed, *data, str(first[shared].folder / "model"))
            second.append(job(f"{arm.name}-seed{seed}", arm_recipe(arm, recipe, steps), "stage2"))
    return [list(first.values()), second]


def run_study(out: Path, settings: DemoSettings, steps: int = STAGE2_STEPS) -> dict[str, Any]:
    """Run what is not finished, and write the tables.

    Raises:
        CwdpoError: every cell failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    RunDir(out).write_environment()
    waves = plan(out, settings.seeds, write_data(out, settings), steps)
    progress = Progress(len(waves[0]) * STAGE1_STEPS + len(waves[1]) * steps)
    try:
        results = run_grid(waves, settings.workers, progress)
    finally:
        progress.stop()
    if not any(r.status == "done" for r in results.values()):
        raise CwdpoError(f"every cell failed; the first: {next(iter(results.values())).error}")
    summary = summarise(out, settings.seeds, results, steps)
    write_json(out / "mix.json", summary)
    write_text(out / "mix.md", markdown(summary))
    return summary


def summarise(
    out: Path, seeds: Sequence[int], results: Mapping[str, CellResult], steps: int
) -> dict[str, Any]:
    """Figures of every arm with their intervals over seeds, and paired differences."""
    figures: dict[str, dict[str, list[float | None]]] = {}
    rows = []
    for arm in arms():
        cells = [results[f"{arm.name}-seed{seed}"] for seed in seeds]
        figures[arm.name] = {key: [c.figures.get(key) for c in cells] for key, *_ in FIGURES}
        rounds = [RunDir(out / "cells" / c.key).rounds() for c in cells]
        shares = [row["realised"] for found in rounds for row in found]
        rows.append(
            {
                "arm": arm.name,
                "rounds": arm.rounds,
                "against": arm.against,
                "figures": {key: mean_interval(values) for key, values in figures[arm.name].items()},
                "realised": sum(shares) / len(shares) if shares and None not in shares else None,
                "replaced_chosen": sum(row["replaced_chosen"] for found in rounds for row in found),
                "failed": {c.key: c.error for c in cells if c.status == "failed"},
            }
        )
    for row in rows:
        if row["against"]:
            ours, theirs = figures[row["arm"]], figures[row["against"]]
            row["differences"] = {key: mean_interval(_paired(ours[key], theirs[key])) for key, *_ in FIGURES}
    return {"seeds": list(seeds), "steps": steps, "arms": rows}


def _paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def markdown(summary: Mapping[str, Any]) -> str:
    """Two tables: figures, and differences to the arm that one knows already."""
    head = " | ".join(label for _, label, _ in FIGURES)
    lines = [
        f"{len(summary['seeds'])} seeds, {summary['steps']} steps of stage 2 in every arm; mean ± half of the 95% "
        "t interval over seeds. An arm is method-negatives(-chosen)-rounds.",
        "",
        f"| arm | {head} | on-policy share |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    for row in summary["arms"]:
        cells = [_shown(row["figures"][key], digits) for key, _, digits in FIGURES]
        name = row["arm"] + (f" ({len(row['failed'])} FAILED)" if row["failed"] else "")
        share = "-" if row["realised"] is None else f"{row['realised']:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {share} |")
    lines += [
        "",
        "Differences, paired by seed, with their 95% interval; bold where it excludes zero:",
        "",
        f"| arm minus arm | {head} |",
        "|---" * (len(FIGURES) + 1) + "|",
    ]
    for row in summary["arms"]:
        if "differences" in row:
            cells = [_difference(row["differences"][key], digits) for key, _, digits in FIGURES]
            lines.append(f"| {row['arm']} minus {row['against']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(found: Mapping[str, Any], digits: int) -> str:
    if found["mean"] is None:
        return "-"
    half = "" if found["low"] is None else f" ±{(found['high'] - found['low']) / 2:.{digits}f}"
    return f"{found['mean']:.{digits}f}{half}"


def _difference(found: Mapping[str, Any], digits: int) -> str:
    if found["mean"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:+.{digits}f}"
    text = f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    return text if found["low"] <= 0 <= found["high"] else f"**{text}**"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/mix-study"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STAGE2_STEPS, help="of stage 2, in every arm")
    parser.add_argument("--test-prompts", type=int, default=200)
    given = parser.parse_args()
    settings = DemoSettings(
        seeds=tuple(range(given.seeds)), hot_seeds=(), workers=given.workers, test_prompts=given.test_prompts
    )
    print(markdown(run_study(given.out, settings, given.steps)))


if __name__ == "__main__":
    main()
