"""The summary of a study's cells: means with intervals, paired differences, curves and captions of some variants."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cwdpo.evaluation.intervals import mean_interval
from cwdpo.evaluation.paired import conclusion, holm, paired_difference, two_way_interval
from cwdpo.files.reading import read_jsonl
from cwdpo.judging.win_rate import win_rate
from cwdpo.lab.captions import SAMPLES
from cwdpo.lab.gallery import gallery
from cwdpo.lab.grid import CellResult
from cwdpo.lab.panel import panel_of
from cwdpo.lab.plan import BASE, Plan
from cwdpo.lab.spec import Decodings, Study, overrides_of
from cwdpo.report.summary import (
    Bin,
    CellState,
    Difference,
    Figure,
    Mean,
    Point,
    Row,
    Summary,
)
from cwdpo.rundir import RunDir

WORLD_FIGURES = (
    Figure("sampled_correct", "all correct, T=1", "higher", 3, "captions that are right in every fact", True),
    Figure("greedy_correct", "all correct, greedy", "higher", 3, "the same for greedy captions", True),
    Figure("ill_formed", "ill-formed, T=1", "lower", 3, "captions that are not a sentence of the world", True),
    Figure("judge_score", "judge score, T=1", "higher", 3, "F1 of stated facts", True),
    Figure("win_rate", "win rate", "higher", 3, "by the judge's score, prompt by prompt; a tie counts half", True),
    Figure("ece", "token ECE", "lower", 3, "calibration error of the next token on held-out chosen captions", True),
    Figure("top1", "top-1 probability", "none", 3, "mean largest next-token probability on held-out chosen captions"),
    Figure("tv", "TV", "none", 3, "total variation to the stage-1 policy, per token"),
    Figure("js", "JS", "none", 4, "Jensen-Shannon divergence to the stage-1 policy, nats per token"),
    Figure("kl", "KL", "none", 3, "KL to the stage-1 policy, nats per token", True),
    Figure("delta_logp/chosen", "Δ chosen", "none", 3, "change of held-out mean_logp in stage 2, nats per token", True),
    Figure("delta_logp/hard", "Δ hard", "none", 3, "the same for negatives with one word wrong"),
    Figure("delta_logp/medium", "Δ medium", "none", 3, "the same for negatives with several errors"),
    Figure("delta_logp/easy", "Δ easy", "none", 3, "the same for captions of another image"),
    Figure("delta_logp/shuffled", "Δ shuffled", "none", 3, "the same for shuffled words"),
    Figure("grad_norm_cv", "grad-norm CV", "lower", 2, "standard deviation / mean of the gradient norms", True),
    Figure("grad_norm_tail", "grad-norm p95/median", "lower", 2, "of the gradient norms after step 20"),
    Figure("steps_to_95", "steps to 95%", "none", 0, "first measured step with 95% of the best held-out margin", True),
)  # fmt: skip
CURVES = (
    "chosen_shift",
    "rejected_shift",
    "margin",
    "entropy",
    "ece",
    "kl",
    "delta_logp/",
    "cooling/weight/",
)
"""Beginnings of the names of held-out readings whose curves are shown on the page."""
CHANGES = ("tv", "js", "kl", "delta_logp/")
"""Beginnings of the names of figures that compare with the start of stage 2; the starting model has none of them."""
BINS = 15
Cells = Mapping[str, Sequence[CellResult | None]]
"""For each variant, its cells by seed; ``None`` for a seed that the variant does not run."""
Pictures = Callable[[str, str], Sequence[Sequence[float] | None]]
"""(variant, figure) -> its values by seed and test image."""


def outcome(
    out: Path,
    study: Study,
    seeds: Sequence[int],
    planned: Plan,
    results: Mapping[str, CellResult],
    chosen: Mapping[str, Sequence[str]],
    *,
    running: bool = False,
) -> Summary:
    """The study's summary.

    Figures are compared by seed, because all variants see the same images in the same order. p-values are corrected
    (Holm) within a figure, for the number of comparisons.

    Args:
        out, study, seeds, planned, results: the folder, the study, its seeds, its plan and the finished cells.
        chosen: overrides by variant that a sweep chose.
        running: whether cells without a result are still to come; then what takes long to compute is left out: win
            rates, intervals over images, curves and reliability diagrams.
    """
    every = max((study.seeds(name, seeds) for name in study.variants), key=len)
    asked = {f"{name}-seed{seed}" for name in study.variants for seed in study.seeds(name, seeds)}
    cells: Cells = {
        name: [_scored(study, _result(results, key, running)) if key in asked else None for key in keys]
        for name, keys in ((name, [f"{name}-seed{seed}" for seed in every]) for name in study.variants)
    }
    figures = figures_of(study, cells)
    read = _Results(out, study, every, cells, running)
    pictured = gallery(out, study, planned, results, every[0])
    rows = [read.row(name, figures, chosen) for name in study.variants]
    base = _scored(study, results[BASE]).figures if BASE in results else {}
    failed = {key: str(r.error) for key, r in sorted(results.items()) if r.status == "failed"}
    return Summary(
        title=study.title or study.name,
        question=study.question,
        full=study.full,
        seeds=tuple(every),
        figures=figures,
        variants=compared(rows, figures) if running else compared(rows, figures, read.pictures),
        panel=panel_of(study, rows),
        shared={key: error for key, error in failed.items() if key not in asked},
        base=_of_base(base, figures),
        shown=study.shown,
        gallery=pictured.pictures,
        head=study.head or tuple(study.score),
        pictures=pictured.note,
        provenance={
            "study": study.name,
            "cells": f"{len(results)} cells, {_hours(out, results):.2f} hours of one process each",
            "answers": f"one greedy to every test prompt, {SAMPLES} at every other temperature",
            "intervals": "t interval over seeds; win rate: percentile bootstrap by prompt, samples of all seeds",
            "two-way intervals": "percentile bootstrap over seeds and test pictures",
            "p-values": "paired t test over seeds, Holm-corrected within a figure",
            "probes": _probe_cost(out, results),
        },
    )


def _of_base(measured: Mapping[str, Any], figures: Sequence[Figure]) -> dict[str, Mean]:
    """The figures of the starting model, which has none that compare with it."""
    known = (f for f in figures if measured.get(f.key) is not None and not f.key.startswith(CHANGES))
    return {f.key: _mean([measured[f.key]]) for f in known}


def figures_of(study: Study, cells: Cells) -> tuple[Figure, ...]:
    """The columns of the table: the figures of the embedded world, or those of the study's metrics."""
    measured = [c.figures for row in cells.values() for c in row if c is not None and c.status == "done"]
    terms = " ".join(f"{weight:+g} {key}" for key, weight in study.score.items())
    score = Figure("score", "score", "higher", 3, f"The sum by which a sweep chooses: {terms}")
    scored = (score,) if any("score" in f for f in measured) else ()
    known = {f.key: f for f in WORLD_FIGURES}
    known["win_rate"] = replace(known["win_rate"], label=f"win rate vs {study.label(study.reference)}")
    if not measured or any("sampled_correct" in f for f in measured):
        return (*scored, *known.values(), *_decoded(study.decodings))
    return (*scored, *_asked(measured, known))


def _asked(measured: Sequence[Mapping[str, Any]], known: Mapping[str, Figure]) -> Iterator[Figure]:
    """The columns of a study on data that is not from the embedded world: its metrics and its judge come first."""
    better = measured[0].get("better", {})
    numbers = [
        k for k, v in measured[0].items() if (isinstance(v, int | float) or v is None) and k != "score"
    ]
    for key in sorted(numbers, key=lambda key: key.partition("@")[0] not in better):
        name, _, where = key.partition("@")
        at = {"": "", "entropy": ", same entropy"}.get(where, f", T={where}")
        if name == "judge_score":
            label, help_ = f"judge score{at or ', T=1'}", "the study's judge, mean over prompts and samples"
            yield Figure(key, label, "higher", 3, help_, True)
            if not where:
                yield known["win_rate"]
        elif key in known:
            yield known[key]
        else:
            yield Figure(
                key, f"{name.replace('_', ' ')}{at}", better.get(name, "none"), 3, "", name in better
            )


def _decoded(decodings: Decodings | None) -> Iterator[Figure]:
    """The columns of the further decodings."""
    if decodings is None:
        return
    yield Figure("greedy_score", "judge score, greedy", "higher", 3, "F1 of stated facts")
    for name in decodings.names:
        where = "same entropy" if name == "entropy" else f"T={name}"
        yield Figure(f"judge_score@{name}", f"judge score, {where}", "higher", 3, "F1 of stated facts")
        yield Figure(
            f"sampled_correct@{name}", f"all correct, {where}", "higher", 3, "captions right in every fact"
        )
        yield Figure(
            f"ill_formed@{name}", f"ill-formed, {where}", "lower", 3, "captions that are not a sentence"
        )
    if decodings.same_entropy:
        help_ = (
            "temperature at which samples have the same entropy per token as the reference's at temperature 1"
        )
        yield Figure("temperature@entropy", "T of the same entropy", "none", 3, help_)


def compared(
    rows: Sequence[Row], figures: Sequence[Figure], pictures: Pictures = lambda name, key: []
) -> tuple[Row, ...]:
    """The rows with ``against`` filled: the differences of each variant to its rival, paired by seed.

    Args:
        rows: one per variant.
        figures: the figures to compare.
        pictures: gives the values of a figure by seed and test image, for the two-way intervals.
    """
    named = {row.name: row.figures for row in rows}
    against: dict[str, dict[str, Difference]] = defaultdict(dict)
    others = [(row, named[row.rival]) for row in rows if row.rival]
    for figure in (f for f in figures if f.key != "win_rate"):
        differences = [
            paired_difference(row.figures[figure.key].per_seed, rival[figure.key].per_seed)
            for row, rival in others
        ]
        corrected = holm([d["p"] for d in differences])
        for (row, _), difference, p in zip(others, differences, corrected, strict=True):
            word = conclusion(difference, figure.better, p)
            both = two_way_interval(pictures(row.name, figure.key), pictures(str(row.rival), figure.key))
            against[row.name][figure.key] = Difference(**difference, p_corrected=p, word=word, two_way=both)
    return tuple(replace(row, against=against[row.name]) for row in rows)


def win_over_seeds(
    ours: Sequence[Sequence[Sequence[float]] | None], rival: Sequence[Sequence[Sequence[float]] | None]
) -> Mean:
    """The win rate over all seeds together; every seed has the same test images.

    Args:
        ours, rival: for each seed, the judge's scores [prompts][samples], or ``None`` if there is no cell.
    """
    both = [(a, b) if a is not None and b is not None else None for a, b in zip(ours, rival, strict=True)]
    per_seed = tuple(None if pair is None else win_rate(*pair).rate for pair in both)
    known = [pair for pair in both if pair is not None]
    if not known:
        return Mean(None, None, None, 0, per_seed)
    # Join the samples of all seeds by prompt, because the bootstrap resamples prompts.
    joined = [
        [[score for samples in prompt for score in samples] for prompt in zip(*side, strict=True)]
        for side in zip(*known, strict=True)
    ]
    w = win_rate(*joined)
    return Mean(w.rate, w.low, w.high, len(known), per_seed)


@dataclass(frozen=True)
class _Results:
    """The cells of a study in its folder, by variant and seed."""

    out: Path
    study: Study
    seeds: Sequence[int]
    cells: Cells
    running: bool = False

    def row(self, name: str, figures: Sequence[Figure], chosen: Mapping[str, Sequence[str]]) -> Row:
        """A variant's row, without comparisons."""
        asked = [(s, c) for s, c in zip(self.seeds, self.cells[name], strict=True) if c is not None]
        done = [c for _, c in asked if c.status == "done"]
        shown = name in self.study.shown and not self.running
        return Row(
            name=name,
            label=self.study.label(name),
            overrides=tuple(overrides_of(self.study, name, chosen)),
            figures={f.key: self.figure(name, f.key) for f in figures},
            rival=self.study.rival(name),
            against={},
            calibration=_calibration(self.out, done),
            cells=tuple(CellState(seed, c.status, c.error, _seconds(self.out, c.key)) for seed, c in asked),
            curves=curves(self.out, done) if shown else {},
            reliability=pooled([c.figures["reliability"] for c in done]) if shown else (),
        )

    def figure(self, name: str, key: str) -> Mean:
        """Mean and interval of a figure over seeds."""
        if key == "win_rate" and self.running:
            return _mean([])
        if key == "win_rate":
            return win_over_seeds(self.values(name, "scores"), self.values(self.study.reference, "scores"))
        return _mean(self.values(name, key))

    def pictures(self, name: str, key: str) -> list[Sequence[float] | None]:
        """For each seed, the values of a figure by test image; ``None`` if they are not known."""
        return [own.get(key) if own else None for own in self.values(name, "pictures")]

    def values(self, name: str, key: str) -> list[Any]:
        """The value of a figure for each seed; ``None`` if there is none."""
        return [None if cell is None else cell.figures.get(key) for cell in self.cells[name]]


def _mean(values: Sequence[float | None]) -> Mean:
    interval = mean_interval(values)
    return Mean(**{**interval, "per_seed": tuple(values)})


def _scored(study: Study, cell: CellResult) -> CellResult:
    score = study.scored(cell.figures)
    return cell if score is None else replace(cell, figures={**cell.figures, "score": score})


def _result(results: Mapping[str, CellResult], key: str, running: bool) -> CellResult:
    if key in results:
        return results[key]
    if running:
        return CellResult(key, "waiting", {}, None, 0.0)
    return CellResult(key, "failed", {}, "not run: a cell that it needs failed", 0.0)


def _calibration(out: Path, cells: Sequence[CellResult]) -> dict[str, tuple[float, ...]]:
    known = [c for cell in cells if (c := RunDir(out / "cells" / cell.key).json("calibration.json"))]
    return {name: tuple(round(c[name], 3) for c in known) for name in ("floor", "tau")} if known else {}


def _seconds(out: Path, key: str) -> float:
    return float(RunDir(out / "cells" / key).json("timing.json").get("seconds", 0.0))


def _hours(out: Path, keys: Mapping[str, Any]) -> float:
    return sum(_seconds(out, key) for key in keys) / 3600


def _probe_cost(out: Path, keys: Mapping[str, Any]) -> str:
    """The share of the held-out measurements in training time and in the whole process time, as a text."""
    timings = (row for key in keys for row in read_jsonl(out / "cells" / key / "timings.jsonl"))
    rows = [row for row in timings if "probe_share" in row]
    spent, trained = (sum(row[k] for row in rows) for k in ("probe_seconds", "seconds"))
    if not trained:
        return "not measured"
    whole = 3600 * _hours(out, keys)
    return f"{100 * spent / trained:.1f}% of training" + (
        f", {100 * spent / whole:.1f}% of all process time" if whole > trained else ""
    )


def curves(out: Path, cells: Sequence[CellResult]) -> dict[str, tuple[Point, ...]]:
    """Mean and interval over seeds, by step, of held-out readings and of the gradient norm."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        run = RunDir(out / "cells" / cell.key)
        for row in run.readings():
            if row["value"] is not None and row["name"].startswith(CURVES):
                values[row["name"]][row["step"]].append(row["value"])
        for row in run.metrics():
            if "grad_norm" in row:
                values["grad_norm"][row["step"]].append(float(row["grad_norm"]))
    return {
        name: tuple(_point(step, steps[step]) for step in sorted(steps)) for name, steps in values.items()
    }


def _point(step: int, values: Sequence[float]) -> Point:
    interval = mean_interval(values)
    return Point(step, interval["mean"], interval["low"], interval["high"])


def pooled(diagrams: Sequence[Sequence[Mapping[str, float]]]) -> tuple[Bin, ...]:
    """The reliability diagrams of several seeds joined into one, weighted by token counts."""
    bins: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for row in itertools.chain(*diagrams):
        bins[int(row["confidence"] * BINS)].append(row)
    diagram = []
    for _, rows in sorted(bins.items()):
        n = int(sum(r["n"] for r in rows))
        confidence, accuracy = (sum(r[k] * r["n"] for r in rows) / n for k in ("confidence", "accuracy"))
        diagram.append(Bin(confidence, accuracy, n))
    return tuple(diagram)
