"""The values for the page of a single run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from cwdpo.report._dynamics import dynamics
from cwdpo.report._negatives import negatives_section
from cwdpo.report._page import Folder, Legend, Panel, Panels, keys, mapping, points, records
from cwdpo.report._text import MISSING, finite, interval_text, number, picture_uri, plain, strip_uri
from cwdpo.report._times import times
from cwdpo.report.figures import histogram

MAX_SAMPLES = 24
MAX_PROBLEMS = 20
STAGES = ("stage1", "stage2")
Rows = Sequence[dict[str, Any]]


def run_page(folder: Folder) -> dict[str, Any]:
    """The values for the template; a part that was not recorded says so."""
    recipe, calibration = folder.yaml("recipe.yaml"), folder.json("calibration.json")
    environment, summary = folder.json("environment.json"), folder.json("summary.json")
    readings, metrics = folder.rows("readings.jsonl"), folder.rows("metrics.jsonl")
    problems = folder.rows("problems.jsonl")
    cooling = _cooling(recipe, calibration)
    names = keys()
    return {
        "dynamics": dynamics(folder, readings, metrics, names),
        "title": plain(recipe.get("name") or summary.get("name") or folder.path.resolve().name),
        "facts": _facts(recipe, summary, readings, metrics),
        "headline": _headline(readings, cooling, summary),
        "stages": [_stage(stage, readings, metrics, names) for stage in STAGES],
        "histogram": _histogram(calibration, cooling, names),
        "samples": _samples(folder),
        "negatives": negatives_section(folder, metrics),
        "problems": [
            {key: plain(row.get(key)) for key in ("stage", "problem")} for row in problems[:MAX_PROBLEMS]
        ],
        "n_problems": len(problems),
        "times": times(folder),
        "recipe": folder.text("recipe.yaml").strip(),
        "versions": _versions(environment),
    }


def _facts(recipe: dict[str, Any], summary: dict[str, Any], readings: Rows, metrics: Rows) -> list[Any]:
    """What was run, as (name, text)."""
    model, data = mapping(recipe.get("model")), mapping(recipe.get("data"))
    source = data.get("path")
    if source is None and data.get("world") is not None:
        source = f"embedded world ({plain(data['world'])})"
    sources = records(data.get("sources"))
    if sources:
        source = f"mixture of {', '.join(plain(s.get('name') or s.get('path')) for s in sources)}"
    tuned = {"full": "all weights", "lora": "LoRA"}.get(plain(model.get("tune")), "")
    facts = [
        (
            "Model",
            f"{plain(model['path'])}{f' ({tuned})' if tuned else ''}" if model.get("path") else MISSING,
        ),
        ("Data", plain(source) if source is not None else MISSING),
    ]
    for title, stage in (("Stage 1", "stage1"), ("Stage 2", "stage2")):
        facts.append((title, _stage_fact(mapping(recipe.get(stage)), stage, [*readings, *metrics])))
    seed = recipe.get("seed", summary.get("seed"))
    return [*facts, ("Seed", plain(seed) if seed is not None else MISSING)]


def _stage_fact(settings: dict[str, Any], stage: str, rows: Rows) -> str:
    if settings.get("enabled") is False:
        return "switched off"
    objective = settings.get("objective")
    name = mapping(objective).get("name") if isinstance(objective, dict) else objective
    done = max(
        (int(s) for r in rows if r.get("stage") == stage and (s := finite(r.get("step")))), default=None
    )
    parts = [plain(name) if name else f"objective {MISSING}"]
    if settings.get("steps"):
        parts.append(f"{'' if done is None else f'{done} of '}{plain(settings['steps'])} steps")
    elif settings.get("epochs"):
        parts.append(f"{plain(settings['epochs'])} epoch(s){'' if done is None else f' = {done} steps'}")
    elif done is not None:
        parts.append(f"{done} steps")
    if settings.get("learning_rate"):
        parts.append(f"learning rate {plain(settings['learning_rate'])}")
    return ", ".join(parts)


def _cooling(recipe: dict[str, Any], calibration: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    """floor and tau with their source; a number in the recipe is used instead of the calibrated one."""
    objective = mapping(mapping(recipe.get("stage2")).get("objective"))
    out: dict[str, tuple[float | None, str]] = {}
    for name in ("floor", "tau"):
        given, found = finite(objective.get(name)), finite(calibration.get(name))
        if given is not None:
            out[name] = (given, "given in the recipe")
        else:
            source = f"from n = {plain(calibration.get('n'))} samples" if found is not None else ""
            out[name] = (found, source + interval_text(calibration, name))
    return out


def _at(readings: Rows, stage: str, name: str, end: int) -> tuple[str, str]:
    """The first (``end`` = 0) or last (-1) reading of a name: value and a note on n, step and unit."""
    rows = [r for r in readings if r.get("stage") == stage and r.get("name") == name]
    rows = sorted((r for r in rows if finite(r.get("step")) is not None), key=lambda r: r["step"])
    if not rows:
        return MISSING, ""
    row = rows[end]
    value = "no value" if row.get("value") is None else number(row["value"])
    return value, f"step {plain(row['step'])}, {plain(row.get('unit'))}, n = {plain(row.get('n'))}"


def _headline(
    readings: Rows, cooling: dict[str, tuple[float | None, str]], summary: dict[str, Any]
) -> list[Any]:
    """The most important numbers, in groups of (label, value, note)."""
    ends = (
        ("Held-out margin", "margin"),
        ("Chosen shift", "chosen_shift"),
        ("Δ log p of chosen", "delta_logp/chosen"),
        ("KL to the start", "kl"),
        ("Token ECE", "ece"),
    )
    stage1 = [
        ("Held-out NLL, start", *_at(readings, "stage1", "nll", 0)),
        ("Held-out NLL, end", *_at(readings, "stage1", "nll", -1)),
    ]
    stage2 = [(label, *_at(readings, "stage2", name, -1)) for label, name in ends]
    cold = [
        (label, number(value), f"nats per token, {source}" if source else "")
        for label, (value, source) in (("Floor", cooling["floor"]), ("Tau", cooling["tau"]))
    ]
    generated = mapping(summary.get("generated"))
    count = f"greedy, n = {plain(generated.get('prompts'))} prompts"
    labels = (
        ("Ended before the length limit", "ended_share", 3),
        ("Words per caption", "mean_words", 1),
        ("Share of distinct captions", "distinct_share", 3),
    )
    written = [
        (label, number(generated[key], digits), count) for label, key, digits in labels if key in generated
    ]
    groups = [
        ("Stage 1", stage1),
        ("End of stage 2", stage2),
        ("Cooling", cold),
        ("Generated captions", written),
    ]
    return [(title, entries) for title, entries in groups if entries]


def _stage(stage: str, readings: Rows, metrics: Rows, names: Iterator[str]) -> dict[str, Any]:
    held: dict[str, list[dict[str, Any]]] = {}
    for row in readings:
        if row.get("stage") == stage:
            held.setdefault(plain(row.get("name")), []).append(row)
    logged = [row for row in metrics if row.get("stage") == stage]
    kinds = _kinds(readings)
    panels = Panels(names)

    def read(title: str, unit: str, *lines: tuple[str, str]) -> None:
        panels.add(
            title, unit, [points(held.get(key, []), label, i, "value") for i, (key, label) in enumerate(lines)],
            legend=len(lines) > 1,
        )  # fmt: skip

    def by_kind(title: str, unit: str, prefix: str) -> None:
        lines = [points(held.get(f"{prefix}/{k}", []), k, i, "value") for i, k in enumerate(kinds)]
        panels.add(title, unit, lines, whole=prefix == "cooling/weight")

    def log(title: str, unit: str, y: str, low: str = "", high: str = "") -> None:
        panels.add(
            title,
            unit,
            [points(logged, title, 0, y, low, high)],
            legend=False,
            whole=y == "cooling/weight_mean",
        )

    read("Held-out NLL of chosen", "nats per token", ("nll", "NLL"))
    shifts = ("chosen_shift", "chosen shift"), ("rejected_shift", "rejected shift"), ("margin", "margin")
    read("Shifts and margin, held out", "nats per completion", *shifts)
    by_kind("Δ log p by kind, held out", "nats per token, since the start of the stage", "delta_logp")
    if stage == "stage2":
        by_kind("Cooling weight by kind, held out", "0 to 1", "cooling/weight")
        band = "cooling/weight_mean", "cooling/weight_p10", "cooling/weight_p90"
        log("Cooling weight in training", "mean, and the band from p10 to p90", *band)
    read("Entropy, held out", "nats per token", ("entropy", "entropy"))
    read("Top-1 probability, held out", "probability", ("top1", "top-1"))
    moved = ("tv", "total variation"), ("js", "Jensen-Shannon"), ("kl", "KL")
    read("Distance from the stage's start", "probability (TV), nats per token (JS, KL)", *moved)
    read("Token ECE, held out", "probability", ("ece", "ECE"))
    for reading, title in (("margin", "Margin"), ("nll", "NLL of chosen")):
        lines = [
            (key, key.split("/")[1])
            for key in sorted(held)
            if key.startswith("source/") and key.endswith(reading)
        ]
        if lines:
            read(f"{title} by source, held out", "nats per token" if reading == "nll" else "nats", *lines)
    log("Training loss", "as logged", "loss")
    log("Gradient norm", "before clipping", "grad_norm")
    return {"title": f"Stage {stage[-1]}", "id": stage, "panels": panels.found, "absent": panels.absent}


def _kinds(readings: Rows) -> list[str]:
    """``chosen``, then the kinds of negatives of both stages, so that colours are the same in both."""
    prefixes = ("delta_logp/", "cooling/weight/")
    found = {
        n.removeprefix(p) for r in readings for p in prefixes if (n := plain(r.get("name"))).startswith(p)
    }
    return ["chosen", *sorted(found - {"chosen"})]


def _histogram(
    calibration: dict[str, Any], cooling: dict[str, tuple[float | None, str]], names: Iterator[str]
) -> Panel | None:
    stored = calibration.get("mean_logps")
    values = [v for m in (stored if isinstance(stored, list) else []) if (v := finite(m)) is not None]
    if not values:
        return None
    floor, tau = cooling["floor"][0], cooling["tau"][0]
    marks, legend = [], []
    if floor is not None:
        marks.append((floor, 0))
        legend.append(Legend("floor (weight 0.5)", 0, number(floor)))
        if tau is not None:
            marks.append((floor + tau, 1))
            legend.append(Legend("floor + tau (weight 0.73)", 1, number(floor + tau)))
    svg = Markup(histogram(next(names), values, marks, "mean log-likelihood, nats per token"))
    return Panel("Samples of the reference policy", f"n = {len(values)}", svg, tuple(legend))


def _samples(folder: Folder) -> dict[str, Any]:
    rows = folder.rows("samples.jsonl")
    shown = [
        {
            "id": plain(row.get("id")),
            "picture": picture_uri(row["image"], folder.path) if isinstance(row.get("image"), str) else None,
            "strip": strip_uri(row["video"], folder.path) if isinstance(row.get("video"), str) else None,
            "prompt": plain(row.get("prompt")),
            "chosen": plain(row.get("chosen")),
            "responses": [
                {
                    "how": "greedy"
                    if r.get("temperature") == 0
                    else f"temperature {plain(r.get('temperature'))}",
                    "text": plain(r.get("text")),
                    "cut": r.get("ended") is False,
                }
                for r in records(row.get("responses"))
            ],
        }
        for row in rows[:MAX_SAMPLES]
    ]
    return {"shown": shown, "n": len(rows)}


def _versions(environment: dict[str, Any]) -> list[tuple[str, str]]:
    packages = [(plain(k), plain(v)) for k, v in mapping(environment.get("packages")).items()]
    others = [(k, plain(environment[k])) for k in ("python", "platform", "command") if environment.get(k)]
    return [*packages, *others]
