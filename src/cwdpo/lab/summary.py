"""Cells to one summary: means and intervals over seeds, curves, win rates, gallery."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cwdpo.data.read.reader import read_examples
from cwdpo.evaluation.intervals import mean_interval
from cwdpo.judging.win_rate import win_rate
from cwdpo.lab.grid import CellResult
from cwdpo.lab.methods import HOT, Method
from cwdpo.rundir import RunDir
from cwdpo.worlds.judged import judge_captions

RIVAL, OURS = "sft", "cw_dpo"

# key, label, better, digits, help
FIGURES = (
    ("sampled_correct", "all correct, T=1", "higher", 3, "captions that the judge finds right in every fact"),
    ("greedy_correct", "all correct, greedy", "higher", 3, "the same for greedy captions"),
    ("ill_formed", "ill-formed, T=1", "lower", 3, "captions that are no sentence of the world"),
    ("judge_score", "judge score, T=1", "higher", 3, "F1 of stated facts"),
    ("win_rate", "win rate vs SFT", "higher", 3, "pairwise by judge score against continued SFT, a tie counts half"),
    ("ece", "token ECE", "lower", 3, "expected calibration error of the next token on held-out chosen captions"),
    ("top1", "top-1 probability", "none", 3, "mean largest next-token probability on held-out chosen captions"),
    ("tv", "TV", "none", 3, "total variation to the stage-1 policy, per token"),
    ("js", "JS", "none", 4, "Jensen-Shannon divergence to the stage-1 policy, nats per token"),
    ("kl", "KL", "none", 3, "KL to the stage-1 policy, nats per token"),
    ("delta_logp/chosen", "Δ chosen", "none", 3, "held-out change of mean_logp since stage 2 began, nats per token"),
    ("delta_logp/hard", "Δ hard", "none", 3, "the same for negatives with one word wrong"),
    ("delta_logp/medium", "Δ medium", "none", 3, "the same for negatives with several errors"),
    ("delta_logp/easy", "Δ easy", "none", 3, "the same for captions of another picture"),
    ("delta_logp/shuffled", "Δ shuffled", "none", 3, "the same for shuffled words"),
    ("grad_norm_cv", "grad-norm CV", "lower", 2, "standard deviation over mean of stage 2's gradient norms"),
    ("steps_to_95", "steps to 95%", "none", 0, "first probed step with 95% of the method's own best held-out margin"),
)  # fmt: skip
# What a model says of itself, without a stage to compare with.
BASE_FIGURES = ("sampled_correct", "greedy_correct", "ill_formed", "judge_score", "ece", "top1")
CURVES = ("chosen_shift", "rejected_shift", "margin", "entropy", "ece", "kl")
CURVE_PREFIXES = ("delta_logp/", "cooling/weight/")
GALLERY = 6


def summarise(
    out: Path,
    methods: Sequence[Method],
    seeds: Sequence[int],
    hot_seeds: Sequence[int],
    results: Mapping[str, CellResult],
    provenance: Mapping[str, str],
) -> dict[str, Any]:
    """The demo's summary.json; see :mod:`cwdpo.report.render` for its shape."""
    rows = [_method(out, m, seeds, results, "") for m in methods]
    hot = [_method(out, m, hot_seeds, results, "-hot") for m in methods]
    base = results["base"].figures
    summary: dict[str, Any] = {
        "kind": "demo",
        "title": "cwdpo demo: four ways to use the same preference data",
        "seeds": list(seeds),
        "figures": [
            {"key": key, "label": label, "better": better, "digits": digits, "help": text}
            for key, label, better, digits, text in FIGURES
        ],
        "methods": rows,
        "hot": {"factor": HOT, "methods": hot},
        "base": {"figures": {key: mean_interval([base.get(key)]) for key in BASE_FIGURES}},
        "gallery": gallery(out, methods, seeds[0], results),
        "provenance": dict(provenance),
    }
    summary["note"] = notes()
    summary["verdicts"] = verdicts(rows)
    summary["hot"]["verdicts"] = verdicts(hot)
    return summary


def _method(
    out: Path, m: Method, seeds: Sequence[int], results: Mapping[str, CellResult], suffix: str
) -> dict[str, Any]:
    cells = [results[f"{m.name}{suffix}-seed{seed}"] for seed in seeds]
    figures = {
        key: mean_interval([c.figures.get(key) for c in cells]) for key, *_ in FIGURES if key != "win_rate"
    }
    figures["win_rate"] = _wins(m.name, suffix, seeds, results)
    done = [c for c in cells if c.status == "done"]
    return {
        "name": m.name,
        "label": m.label,
        "settings": {
            "stage 1": m.stage1,
            "stage 2": m.stage2,
            "learning_rate": m.learning_rate * (HOT if suffix else 1),
            **_calibrations(out, done),
        },
        "figures": figures,
        "cells": [
            {"seed": seed, "status": c.status, "error": c.error, "seconds": round(c.seconds, 1)}
            for seed, c in zip(seeds, cells, strict=True)
        ],
        "curves": curves(out, done),
        "reliability": _pooled([c.figures["reliability"] for c in done]),
    }


def _calibrations(out: Path, cells: Sequence[CellResult]) -> dict[str, Any]:
    found = [RunDir(out / "cells" / c.key).json("calibration.json") for c in cells]
    known = [c for c in found if c]
    if not known:
        return {}
    return {name: [round(c[name], 3) for c in known] for name in ("floor", "tau")}


def _wins(name: str, suffix: str, seeds: Sequence[int], results: Mapping[str, CellResult]) -> dict[str, Any]:
    """Against continued SFT at its own settings."""
    ours = [results[f"{name}{suffix}-seed{seed}"].figures.get("scores") for seed in seeds]
    return win_over_seeds(ours, [results[f"{RIVAL}-seed{seed}"].figures.get("scores") for seed in seeds])


def win_over_seeds(
    ours: Sequence[Sequence[Sequence[float]] | None], rival: Sequence[Sequence[Sequence[float]] | None]
) -> dict[str, Any]:
    """Win rate over prompts of all seeds together: the same pictures are asked in every seed.

    Args:
        ours, rival: per seed the judge's scores [prompts][samples], or ``None`` for a failed cell.
    """
    both = [(a, b) if a is not None and b is not None else None for a, b in zip(ours, rival, strict=True)]
    per_seed = [None if pair is None else win_rate(*pair).rate for pair in both]
    known = [pair for pair in both if pair is not None]
    if not known:
        return {"mean": None, "low": None, "high": None, "n": 0, "per_seed": per_seed}
    # One prompt, more samples: prompts are what is resampled.
    joined = [
        [[score for own in prompt for score in own] for prompt in zip(*side, strict=True)]
        for side in zip(*known, strict=True)
    ]
    w = win_rate(*joined)
    shares = {"win": w.win, "tie": w.tie, "loss": w.loss, "n_prompts": w.n_prompts}
    return {"mean": w.rate, "low": w.low, "high": w.high, "n": len(known), "per_seed": per_seed, **shares}


def curves(out: Path, cells: Sequence[CellResult]) -> dict[str, list[dict[str, Any]]]:
    """Mean and interval over seeds of every held-out reading by step, and of the gradient norm."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        run = RunDir(out / "cells" / cell.key)
        for row in run.readings():
            name = row["name"]
            if row["value"] is not None and (name in CURVES or name.startswith(CURVE_PREFIXES)):
                values[name][row["step"]].append(row["value"])
        for row in run.metrics():
            if "grad_norm" in row:
                values["grad_norm"][row["step"]].append(float(row["grad_norm"]))
    table = {}
    for name, steps in values.items():
        points = []
        for step in sorted(steps):
            found = mean_interval(steps[step])
            points.append({"step": step, **{k: found[k] for k in ("mean", "low", "high")}})
        table[name] = points
    return table


def _pooled(diagrams: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Reliability bins of several seeds, pooled by token counts."""
    bins: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for diagram in diagrams:
        for row in diagram:
            bins[int(row["confidence"] * 15)].append(row)
    pooled = []
    for index in sorted(bins):
        n = sum(r["n"] for r in bins[index])
        mean = {k: sum(r[k] * r["n"] for r in bins[index]) / n for k in ("confidence", "accuracy")}
        pooled.append({**mean, "n": n})
    return pooled


def gallery(
    out: Path, methods: Sequence[Method], seed: int, results: Mapping[str, CellResult]
) -> list[dict[str, Any]]:
    """The first test pictures with every method's greedy caption and the judge's marks."""
    test = read_examples(out / "data" / "held-out" / "test.jsonl").examples[:GALLERY]
    rows: list[dict[str, Any]] = [
        {"image": f"data/held-out/images/{e.id}.png", "truth": e.chosen.text, "captions": []} for e in test
    ]
    labelled = [("base", results["base"]), *((m.label, results[f"{m.name}-seed{seed}"]) for m in methods)]
    for label, cell in labelled:
        texts = cell.figures.get("greedy", [])[: len(test)]
        judged = judge_captions(test[: len(texts)], texts)  # a failed cell has written nothing
        for row, text, j in zip(rows, texts, judged, strict=False):
            marks = {
                k: getattr(j, k) for k in ("all_correct", "wrong", "hallucinated", "omitted", "ill_formed")
            }
            row["captions"].append({"method": label, "text": text, **marks})
    return rows


def notes() -> list[str]:
    """What is compared."""
    return [
        "Every method starts from the same imperfect base model, sees the same pictures and takes the same number "
        "of optimizer steps, at its own learning rate, beta and SFT weight from one sweep of equal budget on "
        "other seeds and pictures. Numbers are means over seeds with 95% intervals, on a test split that "
        "nothing was tuned on."
    ]


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """CW-DPO against every rival, figure by figure: paired differences over seeds, and what they allow to say.

    ``word`` is ``better`` or ``worse`` only where the 95% interval of the difference excludes zero.
    """
    ours = next((m for m in rows if m["name"] == OURS), None)
    if ours is None:
        return []
    table = []
    for key, label, better, *_ in FIGURES:
        if better != "none" and key != "win_rate":
            against = [compared(key, better, ours, m) for m in rows if m is not ours]
            table.append({"key": key, "label": label, "against": against})
    return table


def compared(key: str, better: str, ours: Mapping[str, Any], rival: Mapping[str, Any]) -> dict[str, Any]:
    """One cell of :func:`verdicts`: the mean of ours minus theirs over the seeds that both finished."""
    pairs = zip(ours["figures"][key]["per_seed"], rival["figures"][key]["per_seed"], strict=True)
    found = mean_interval([a - b for a, b in pairs if a is not None and b is not None])
    if found["low"] is None:
        word = "not measured"
    elif found["low"] <= 0 <= found["high"]:
        word = "no clear difference"
    else:
        word = "better" if (found["mean"] > 0) == (better == "higher") else "worse"
    return {"rival": rival["label"], "word": word, **{k: found[k] for k in ("mean", "low", "high", "n")}}
