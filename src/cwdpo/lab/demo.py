"""``cwdpo demo``: continued SFT, DPO, DPO + SFT term and CW-DPO side by side on the embedded world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cwdpo.errors import CwdpoError
from cwdpo.lab.cell import SAMPLES, CellJob, StageOfCell
from cwdpo.lab.grid import CellResult, Tick, run_grid
from cwdpo.lab.methods import (
    HOT,
    STAGE1_STEPS,
    STAGE2_STEPS,
    TRAIN_ROWS,
    Method,
    cell_recipe,
    swept_methods,
)
from cwdpo.lab.summary import summarise
from cwdpo.lab.worlds import write_world
from cwdpo.models.load import EMBEDDED
from cwdpo.rundir import RunDir, read_jsonl, write_json

KIND_SHARES = {"hard": 0.35, "medium": 0.15, "easy": 0.3, "shuffled": 0.2}


@dataclass(frozen=True)
class DemoSettings:
    """Size of the comparison."""

    seeds: tuple[int, ...] = (0, 1, 2)
    hot_seeds: tuple[int, ...] = (0, 1, 2)
    test_prompts: int = 200
    workers: int = 2


class Progress:
    """One steady line: cells done, method, seed, step, time left."""

    def __init__(self, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=total_steps)
        self._live = self._bar.console.is_terminal
        self._bar.start()

    def __call__(self, event: Tick | CellResult) -> None:
        """Show one optimizer step, or a finished cell."""
        if isinstance(event, CellResult):
            if event.status == "failed" or not self._live:
                word = "FAILED: " + str(event.error) if event.status == "failed" else "done"
                self._bar.console.print(f"{event.key}: {word} ({event.seconds:.0f} s)", markup=False)
            return
        key, stage, step, steps = event
        self._bar.update(self._task, advance=1, description=f"{key} {stage} step {step}/{steps}")

    def stop(self) -> None:
        """End the line."""
        self._bar.stop()


def write_data(out: Path, settings: DemoSettings) -> dict[str, str]:
    """Write the world's data: training rows per seed, and one validation and one test set for all."""
    from cwdpo.worlds.shapes import ShapesSettings

    world = ShapesSettings(
        seed=0, train=TRAIN_ROWS, validation=max(settings.test_prompts, 64),
        test=settings.test_prompts, shares=KIND_SHARES, questions=0.0,
    )  # fmt: skip
    return write_world(out / "data", world, settings.seeds, "test")


def plan(
    out: Path, methods: Sequence[Method], settings: DemoSettings, paths: dict[str, str]
) -> list[list[CellJob]]:
    """Two waves: the shared stage-1 runs and the base's evaluation, then every cell."""
    test = Path(paths["test"])
    first: dict[str, CellJob] = {}
    second: list[CellJob] = []

    def job(key: str, m: Method, seed: int, stage: StageOfCell, model: str, factor: float = 1.0) -> CellJob:
        recipe = cell_recipe(m, seed, paths[f"train{seed}"], paths["validation"], model, factor)
        return CellJob(key, recipe, out / "cells" / key, test, stage)

    for seed in settings.seeds:
        for m in methods:
            key = f"stage1-{m.stage1['name']}-seed{seed}"
            if key not in first:
                first[key] = job(key, replace(m, name=m.stage1["name"]), seed, "stage1", str(EMBEDDED))
            start = str(first[key].folder / "model")
            second.append(job(f"{m.name}-seed{seed}", m, seed, "stage2", start))
            if seed in settings.hot_seeds:
                second.append(job(f"{m.name}-hot-seed{seed}", m, seed, "stage2", start, HOT))
    base = job("base", methods[0], settings.seeds[0], "base", str(EMBEDDED))
    return [[*first.values(), base], second]


def steps_of(waves: Sequence[Sequence[CellJob]]) -> int:
    """Optimizer steps of all cells that train."""
    per = {"stage1": STAGE1_STEPS, "stage2": STAGE2_STEPS, "base": 0}
    return sum(per[job.stage] for wave in waves for job in wave)


def run_demo(out: str | Path = "runs/demo", settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run the comparison, write summary.json and report.html, and return the summary.

    Finished cells of an earlier start in the same folder are used again.

    Raises:
        CwdpoError: every cell failed.
    """
    from cwdpo.report.render import write_report

    out, settings = Path(out), settings or DemoSettings()
    out.mkdir(parents=True, exist_ok=True)
    RunDir(out).write_environment()
    methods = swept_methods()
    waves = plan(out, methods, settings, write_data(out, settings))
    progress = Progress(steps_of(waves))
    try:
        results = run_grid(waves, settings.workers, progress)
    finally:
        progress.stop()
    if not any(r.status == "done" for r in results.values()):
        raise CwdpoError(f"every cell failed; the first: {next(iter(results.values())).error}")
    provenance = {**_provenance(settings), "probes": _probe_cost(out, results)}
    summary = summarise(out, methods, settings.seeds, settings.hot_seeds, results, provenance)
    write_json(out / "summary.json", summary)
    write_report(out)
    return summary


def _probe_cost(out: Path, results: Mapping[str, CellResult]) -> str:
    """What the held-out measurements took of training and of the whole cells."""
    rows = [
        r for key in results for r in read_jsonl(out / "cells" / key / "timings.jsonl") if "probe_share" in r
    ]
    spent, trained = (sum(r[k] for r in rows) for k in ("probe_seconds", "seconds"))
    whole = sum(r.seconds for r in results.values())
    if not (trained and whole > trained):  # cells of an earlier start take no time in this one
        return f"{spent:.0f} s of {trained:.0f} s of training"
    return f"{100 * spent / trained:.1f}% of training, {100 * spent / whole:.1f}% of the demo's process time"


def _provenance(settings: DemoSettings) -> dict[str, str]:
    sizes = {k: str(v) for k, v in asdict(settings).items()}
    return {
        **sizes,
        "steps": f"{STAGE1_STEPS} in stage 1 + {STAGE2_STEPS} in stage 2 for every method",
        "training rows per seed": str(TRAIN_ROWS),
        "samples per test picture at temperature 1": str(SAMPLES),
        "intervals": "t interval over seeds; win rate: percentile bootstrap by prompt, samples of all seeds",
    }
