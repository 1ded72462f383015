"""``cwdpo ablate`` runs a study over seeds in parallel processes; ``cwdpo sweep`` tunes its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cwdpo.errors import CwdpoError, RecipeError
from cwdpo.files.writing import write_json, write_text
from cwdpo.lab import findings, stopping
from cwdpo.lab.grid import Bar, CellResult, Tick, no_bar, run_grid
from cwdpo.lab.live import LivePage
from cwdpo.lab.outcome import outcome
from cwdpo.lab.plan import Asked, Plan, asked, checked_tree, plan
from cwdpo.lab.progress import Progress
from cwdpo.lab.spec import Study, Variant, overrides_of
from cwdpo.lab.tables import markdown, to_csv
from cwdpo.lab.trace import Traced
from cwdpo.report.render import write_report
from cwdpo.report.summary import Summary
from cwdpo.rundir import RunDir

TUNING_SEED = 100
"""First seed of a sweep; no study uses the images and orders of this seed."""


def ablate(
    recipe: Path,
    study: Study,
    out: Path,
    *,
    seeds: int,
    jobs: int,
    chosen: Mapping[str, Sequence[str]] | None = None,
    test: Path | None = None,
    bar: Bar = no_bar,
    on_page: Callable[[Path], None] | None = None,
) -> Summary:
    """Run a study and write summary.json, table.md, table.csv and report.html to ``out``.

    A finished cell is not run again. A killed cell starts again from the beginning. A failed cell is shown as failed,
    and run again at the next start. A study with an analysis also writes ``<analysis>.md`` and ``<analysis>.json``.
    The page is there from the start, shows what is known, and reloads itself until the study ends.

    Args:
        recipe: the recipe file that the variants change.
        study: the study.
        out: folder to write to.
        seeds: number of seeds.
        jobs: number of parallel processes.
        chosen: overrides by variant that a sweep chose.
        test: test set, for data that is not from the embedded world.
        bar: shows the progress.
        on_page: called once with the page, as soon as it is there.

    Raises:
        RecipeError: recipe, study or overrides are invalid.
        CwdpoError: all cells failed, or too many for the analysis.
    """
    chosen = chosen or {}
    settings = _settings(study, chosen)
    if study.panel:
        study, chosen = study.expanded(chosen), {}
    numbers = list(range(study.first_seed, study.first_seed + seeds))
    run = _started(out)
    try:
        planned = plan(
            out, checked_tree(recipe), study, asked(study, numbers, chosen), split="test", test=test
        )
        page = LivePage(out, study, numbers, planned, chosen)
        page.write(None)
        if on_page is not None:
            on_page(page.path)
        results = _run(planned, jobs, bar, page)
        summary = outcome(out, study, numbers, planned, results, chosen)
        summary.provenance["settings"] = settings
        summary.write(out)
        write_text(out / "table.md", markdown(summary))
        write_text(out / "table.csv", to_csv(summary))
        write_report(out)
        if study.analysis:
            _analyse(out, study, planned, results)
    finally:
        run.unlock()
    return summary


def _analyse(out: Path, study: Study, planned: Plan, results: Mapping[str, CellResult]) -> None:
    """Write the study's analysis of the trajectories of the finished cells."""
    runs = []
    for name, variant in study.variants.items():
        cells = [r for key, r in results.items() if key.startswith(f"{name}-seed") and r.figures.get("trace")]
        runs += [Traced.load(planned.job(r.key), name, variant, r.figures) for r in cells]
    if len(runs) < 2:
        raise CwdpoError(
            f"study {study.name}: thresholds are chosen on one half of the runs and tested on the other, but only "
            f"{len(runs)} ended with measurements: use more --seeds or variants"
        )
    analyse = {"findings": findings.analyse, "stopping": stopping.analyse}[str(study.analysis)]
    tables, text = analyse(runs)
    write_json(out / f"{study.analysis}.json", tables)
    write_text(out / f"{study.analysis}.md", text)


def sweep(
    recipe: Path,
    study: Study,
    out: Path,
    *,
    finalists: int,
    jobs: int,
    test: Path | None = None,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Find the best point of each variant's grid on validation images and tuning seeds, with the same budget for all.

    All points run with the first tuning seed, and the best ``finalists`` also with the second one. The point with the
    best mean score is chosen. Writes ``chosen.yaml``, ``sweep.json`` and ``sweep.md``, which also names chosen values
    at the edge of their grid. For the other arguments see :func:`ablate`.

    Returns:
        ``chosen``: overrides by variant; ``edges``: by variant, the chosen values that are at the edge of the grid.

    Raises:
        RecipeError: no variant has a grid, or the grids have different numbers of points.
    """
    grids = {name: v.settings() for name, v in study.variants.items() if v.grid}
    sizes = {name: len(points) for name, points in grids.items()}
    if not grids or len(set(sizes.values())) > 1:
        raise RecipeError(
            f"study {study.name}: for a fair comparison every grid must have the same number of points; got "
            f"{sizes or 'no grid'}"
        )
    study = study.model_copy(
        update={"base": False, "analysis": None, "decodings": None}
    )  # only the score is needed
    run = _started(out)
    tried: dict[str, list[_Tried]] = {name: [_Tried(p) for p in points] for name, points in grids.items()}
    try:
        tree = checked_tree(recipe)
        wanted = [(name, i) for name, points in grids.items() for i in range(len(points))]
        for seed in (TUNING_SEED, TUNING_SEED + 1):
            cells = _points(study, tried, wanted, seed)
            results = _run(plan(out, tree, study, cells, split="validation", test=test), jobs, bar)
            for name, i in wanted:
                tried[name][i].take(results.get(f"{name}-{i}-seed{seed}"), study)
            wanted = [(name, i) for name in grids for i in _best(tried[name])[:finalists]]
    finally:
        run.unlock()
    best = {name: points[_best(points)[0]] for name, points in tried.items()}
    write_json(out / "sweep.json", {name: [vars(t) for t in points] for name, points in tried.items()})
    write_text(out / "sweep.md", sweep_table(study, tried))
    chosen = {name: list(t.settings) for name, t in best.items() if t.scores}
    edges = {name: at_edge(study.variants[name], settings) for name, settings in chosen.items()}
    head = f"# Written by cwdpo sweep of the study {study.name}; give it to cwdpo ablate with --tuned.\n"
    write_text(out / "chosen.yaml", head + yaml.safe_dump({"chosen": chosen}, sort_keys=False))
    return {"chosen": chosen, "edges": {name: keys for name, keys in edges.items() if keys}}


def at_edge(variant: Variant, settings: Sequence[str]) -> list[str]:
    """The chosen numbers that are the lowest or highest of at least three tried ones: a better one may be beyond."""
    chosen = {key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in settings)}
    edges = []
    for key, values in variant.grid.items():
        numbers = sorted(v for v in values if isinstance(v, int | float))
        if len(numbers) > 2 and chosen.get(key) in (numbers[0], numbers[-1]):
            which = "lowest" if chosen[key] == numbers[0] else "highest"
            edges.append(f"{key}={chosen[key]:g} is the {which} that was tried")
    return edges


class _Tried:
    """One point of a grid: its overrides, the scores so far (one per seed), and why it failed, if it did."""

    def __init__(self, settings: Sequence[str]) -> None:
        self.settings = list(settings)
        self.scores: list[float] = []
        self.figures: list[dict[str, float]] = []
        self.error: str | None = None

    def take(self, result: CellResult | None, study: Study) -> None:
        if result is None or result.status == "failed":
            self.error = "never ran" if result is None else result.error
            return
        score = study.scored(result.figures)
        if score is None:
            missing = next(key for key in study.score if result.figures.get(key) is None)
            raise RecipeError(
                f"study: score: the cells have no figure {missing!r}; known: {', '.join(result.figures)}"
            )
        self.figures.append({key: float(result.figures[key]) for key in study.score})
        self.scores.append(score)

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else float("-inf")


def _points(
    study: Study, tried: Mapping[str, Sequence[_Tried]], wanted: Sequence[tuple[str, int]], seed: int
) -> list[Asked]:
    cells = []
    teachers = {study.variants[name].margins_from for name, _ in wanted} - {None}
    for name, i in wanted:
        overrides = (*overrides_of(study, name, {}), *tried[name][i].settings)
        teacher = study.variants[name].margins_from
        cells.append(
            Asked(
                f"{name}-{i}-seed{seed}", name, overrides, seed, teacher and f"{teacher}-teacher-seed{seed}"
            )
        )
    for teacher in sorted(t for t in teachers if t):
        overrides = tuple(overrides_of(study, teacher, {}))
        cells.append(Asked(f"{teacher}-teacher-seed{seed}", teacher, overrides, seed))
    return cells


def _best(points: Sequence[_Tried]) -> list[int]:
    """Indices of the points, best first: sorted by number of seeds, then by mean score; failed points last."""
    return sorted(range(len(points)), key=lambda i: (len(points[i].scores), points[i].score), reverse=True)


def sweep_table(study: Study, tried: Mapping[str, Sequence[_Tried]]) -> str:
    """The sweep as markdown: all points that were tried, best first."""
    lines = [f"Score: {' + '.join(f'{w:g} {k}' for k, w in study.score.items())}, on validation pictures."]
    for name, points in tried.items():
        names = list(study.score)
        lines += [
            "",
            f"### {study.label(name)}",
            "",
            "| settings | seeds | score | " + " | ".join(names) + " |",
        ]
        lines += ["|---" * (3 + len(names)) + "|"]
        for i in _best(points):
            t = points[i]
            if not t.scores:
                lines.append(f"| {', '.join(t.settings)} | 0 | failed: {t.error} |" + " |" * len(names))
                continue
            means = [sum(f[k] for f in t.figures) / len(t.figures) for k in names]
            cells = " | ".join(f"{v:.3f}" for v in (t.score, *means))
            lines.append(f"| {', '.join(t.settings)} | {len(t.scores)} | {cells} |")
        edges = at_edge(study.variants[name], points[_best(points)[0]].settings)
        lines += [
            "",
            *(f"At the edge of its grid: {edge}; a better value may be beyond it." for edge in edges),
        ]
    return "\n".join(lines) + "\n"


def _run(planned: Plan, jobs: int, bar: Bar, page: LivePage | None = None) -> dict[str, CellResult]:
    waves = planned.waves
    progress = Progress({job.key: job.steps for wave in waves for job in wave})
    with bar(progress) as shown:

        def on_event(event: Tick | CellResult) -> None:
            if isinstance(event, CellResult):
                progress.end(event.key)
                if page is not None:
                    page.add(event, progress)
            else:
                progress.step(event[0])
            shown(event)

        results = run_grid(waves, jobs, on_event)
    if not any(r.status == "done" for r in results.values()):
        raise CwdpoError(f"all cells failed; the first: {next(iter(results.values())).error}")
    return results


def _started(out: Path) -> RunDir:
    run = RunDir(out)
    run.lock()
    run.recover()
    run.write_environment()
    return run


def _settings(study: Study, chosen: Mapping[str, Sequence[str]]) -> str:
    """Which variants use settings chosen by a sweep, as a text; an error if no variant uses the given settings."""
    tuned = [name for name in study.variants if study.tuned_by(name) in chosen]
    if not tuned and chosen:
        wanted = sorted({study.tuned_by(name) for name in study.variants})
        raise RecipeError(
            f"the tuned settings are for {', '.join(sorted(chosen))}, but the study {study.name} uses those of "
            f"{', '.join(wanted)}"
        )
    rest = [name for name in study.variants if name not in tuned]
    parts = {"by a sweep": tuned, "as recipe and study have them": rest}
    return "; ".join(f"{how}: {', '.join(names)}" for how, names in parts.items() if names)
