"""A curriculum against none: CW-DPO with four negatives per prompt, paired by seed.

``python -m cwdpo.lab.curriculum_study --seeds 5 --workers 2 --out runs/curriculum``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cwdpo.evaluation.intervals import mean_interval
from cwdpo.lab.cell import CellJob
from cwdpo.lab.demo import KIND_SHARES, Progress
from cwdpo.lab.grid import CellResult, run_grid
from cwdpo.lab.methods import TRAIN_ROWS, cell_recipe, swept_methods
from cwdpo.lab.traced import shared_test, training_steps, with_recipe
from cwdpo.models.load import EMBEDDED
from cwdpo.rundir import write_json, write_text
from cwdpo.worlds.shapes import ShapesSettings, materialise

ARMS: dict[str, dict[str, Any]] = {"steady": {"name": "steady"}, "by_readings": {"name": "by_readings"}}
FIGURES = ("sampled_correct", "greedy_correct", "ill_formed", "judge_score", "delta_logp/chosen", "kl", "ece")
NEGATIVES = 4


def jobs(out: Path, seeds: Sequence[int], steps: int | None = None) -> list[list[CellJob]]:
    """Stage 1 of each seed, then both arms from its policy."""
    test = shared_test(out)
    ours = next(m for m in swept_methods() if m.name == "cw_dpo")
    first, second = [], []
    for seed in seeds:
        world = ShapesSettings(
            seed=seed, train=TRAIN_ROWS, validation=64, test=0, shares=KIND_SHARES, questions=0.0,
            negatives_per_prompt=NEGATIVES,
        )  # fmt: skip
        paths = materialise(world, out / "data" / f"four-seed{seed}")
        data, held = str(paths["train"]), str(paths["validation"])
        key = f"stage1-seed{seed}"
        first.append(
            CellJob(
                key, cell_recipe(ours, seed, data, held, str(EMBEDDED)), out / "cells" / key, test, "stage1"
            )
        )
        start = cell_recipe(ours, seed, data, held, str(first[-1].folder / "model"))
        for arm, spec in ARMS.items():
            key = f"{arm}-seed{seed}"
            job = CellJob(key, start, out / "cells" / key, test, "stage2")
            stage2 = start.model_dump(mode="json")["stage2"]
            second.append(
                with_recipe(
                    job,
                    {
                        "curriculum": spec,
                        "stop": [],
                        "stage2": {**stage2, **({"steps": steps} if steps else {})},
                    },
                )
            )
    return [first, second]


def compare(results: dict[str, CellResult], seeds: Sequence[int]) -> dict[str, Any]:
    """Means of both arms and the paired differences, with t intervals over seeds."""
    rows = {}
    for figure in FIGURES:
        arms = {arm: [results[f"{arm}-seed{seed}"].figures.get(figure) for seed in seeds] for arm in ARMS}
        pairs = zip(arms["by_readings"], arms["steady"], strict=True)
        difference = [a - b if a is not None and b is not None else None for a, b in pairs]
        rows[figure] = {
            **{arm: mean_interval(v) for arm, v in arms.items()},
            "difference": mean_interval(difference),
        }
    return rows


def markdown(rows: dict[str, Any]) -> str:
    """The table of the study."""

    def cell(found: dict[str, Any]) -> str:
        if found["mean"] is None:
            return "–"
        interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
        return f"{found['mean']:.3f}{interval}"

    lines = ["| figure | none | by readings | difference | n |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = " | ".join(cell(row[k]) for k in ("steady", "by_readings", "difference"))
        lines.append(f"| {name} | {cells} | {row['difference']['n']} |")
    return "\n".join(lines) + "\n"


def study(out: Path, seeds: Sequence[int], workers: int, steps: int | None = None) -> dict[str, Any]:
    """Run what is not there yet, and compare."""
    waves = jobs(out, seeds, steps)
    progress = Progress(training_steps([job for wave in waves for job in wave]))
    try:
        results = run_grid(waves, workers, progress)
    finally:
        progress.stop()
    rows = compare(results, seeds)
    failed = {k: r.error for k, r in results.items() if r.status == "failed"}
    write_json(out / "curriculum.json", {"failed": failed, "rows": rows})
    write_text(out / "curriculum.md", markdown(rows))
    return rows


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/curriculum"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of stage 2; default: the demo's")
    args = parser.parse_args()
    study(args.out, range(args.seeds), args.workers, args.steps)
    print((args.out / "curriculum.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
