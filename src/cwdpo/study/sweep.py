"""The sweep behind the demo: the same budget for every method, on other seeds and pictures.

``python -m cwdpo.study.sweep --out runs/sweep`` writes docs/sweep.md's table and ``swept.yaml``.
Each method gets :data:`BUDGET` settings on the first tuning seed; its best :data:`FINALISTS` run again on
the second. Chosen is the setting with the best mean of
``sampled_correct + greedy_correct - ill_formed`` over both seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cwdpo.models.load import EMBEDDED
from cwdpo.rundir import write_text
from cwdpo.study.cell import CellJob
from cwdpo.study.demo import DemoSettings, Progress, steps_of, write_data
from cwdpo.study.grid import CellResult, run_grid
from cwdpo.study.methods import cell_recipe, method

BUDGET = 8
FINALISTS = 3
SEEDS = (100, 101)

GRID: dict[str, list[dict[str, Any]]] = {
    "sft": [{"learning_rate": lr} for lr in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)],
    "dpo": [{"learning_rate": lr, "beta": b} for b in (0.3, 1.0) for lr in (1.25e-5, 2.5e-5, 5e-5, 1e-4)],
    "dpo_sft": [
        {"learning_rate": lr, "beta": b, "sft_weight": a}
        for b, a in ((0.3, 1.0), (0.3, 5.0), (1.0, 1.0), (1.0, 5.0))
        for lr in (5e-5, 1e-4)
    ],
    "cw_dpo": [{"learning_rate": lr, "beta": b} for b in (0.3, 1.0) for lr in (2.5e-5, 5e-5, 1e-4, 2e-4)],
}


def score(figures: dict[str, Any]) -> float:
    """Temperature-1 and greedy accuracy and well-formedness together."""
    return float(figures["sampled_correct"] + figures["greedy_correct"] - figures["ill_formed"])


def jobs(
    out: Path, wanted: Sequence[tuple[str, int]], seed: int, paths: dict[str, str]
) -> list[list[CellJob]]:
    """Stage-1 runs and cells of some (method, setting index) at one seed."""
    test = Path(paths["test"])
    first: dict[str, CellJob] = {}
    second = []
    for name, index in wanted:
        settings = dict(GRID[name][index])
        m = method(name, **settings)
        start = f"stage1-{m.stage1['name']}-seed{seed}"
        if start not in first:
            recipe = cell_recipe(m, seed, paths[f"train{seed}"], paths["validation"], str(EMBEDDED))
            first[start] = CellJob(start, recipe, out / "cells" / start, test, "stage1")
        model = str(first[start].folder / "model")
        key = f"{name}-{index}-seed{seed}"
        recipe = cell_recipe(m, seed, paths[f"train{seed}"], paths["validation"], model)
        second.append(CellJob(key, recipe, out / "cells" / key, test, "stage2"))
    return [list(first.values()), second]


def sweep(out: Path, workers: int) -> dict[str, Any]:
    """Run the sweep and return, per method, every setting with its scores."""
    # Tuned on the validation pictures, never on the test split.
    data = DemoSettings(seeds=SEEDS, workers=workers, world_seed=0, split="validation")
    paths = write_data(out, data)
    table: dict[str, list[dict[str, Any]]] = {
        name: [{"settings": s, "scores": []} for s in grid] for name, grid in GRID.items()
    }
    wanted = [(name, i) for name, grid in GRID.items() for i in range(len(grid))]
    for seed in SEEDS:
        waves = jobs(out, wanted, seed, paths)
        progress = Progress(steps_of(waves))
        results = run_grid(waves, workers, progress)
        progress.stop()
        for name, i in wanted:
            _record(table[name][i], results[f"{name}-{i}-seed{seed}"])
        wanted = [(name, i) for name in GRID for i in _best(table[name])[:FINALISTS]]
    return table


def _record(row: dict[str, Any], result: CellResult) -> None:
    if result.status == "failed":
        row["scores"].append(None)
        row["error"] = result.error
        return
    row["scores"].append(score(result.figures))
    shown = (
        "sampled_correct",
        "greedy_correct",
        "ill_formed",
        "ece",
        "kl",
        "delta_logp/chosen",
        "grad_norm_cv",
    )
    row.setdefault("figures", []).append({k: result.figures[k] for k in shown})


def _best(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Indices by mean score, more seeds first, failed settings last."""

    def key(i: int) -> tuple[int, float]:
        known = [s for s in rows[i]["scores"] if s is not None]
        return (len(known), sum(known) / len(known)) if known else (0, 0.0)

    return sorted(range(len(rows)), key=key, reverse=True)


def markdown(table: dict[str, list[dict[str, Any]]]) -> str:
    """The sweep as markdown tables."""
    lines = []
    for name, rows in table.items():
        lines += [
            f"\n### {name}\n",
            "| settings | seeds | score | T=1 | greedy | ill-formed |",
            "|---|---|---|---|---|---|",
        ]
        for i in _best(rows):
            row = rows[i]
            known = [s for s in row["scores"] if s is not None]
            if not known:
                lines.append(f"| {row['settings']} | 0 | failed: {row.get('error')} | | | |")
                continue
            means = [
                sum(f[k] for f in row["figures"]) / len(row["figures"])
                for k in ("sampled_correct", "greedy_correct", "ill_formed")
            ]
            values = " | ".join(f"{v:.3f}" for v in (sum(known) / len(known), *means))
            settings = ", ".join(f"{k} {v:g}" for k, v in row["settings"].items())
            lines.append(f"| {settings} | {len(known)} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    table = sweep(args.out, args.workers)
    write_text(args.out / "sweep.json", json.dumps(table, indent=1))
    write_text(args.out / "sweep.md", markdown(table))
    chosen = {name: rows[_best(rows)[0]]["settings"] for name, rows in table.items()}
    head = "# Written by `python -m cwdpo.study.sweep`; the whole table is in docs/sweep.md.\n"
    write_text(args.out / "swept.yaml", head + yaml.safe_dump({"chosen": chosen}, sort_keys=False))


if __name__ == "__main__":
    main()
