"""The model card of a run and of its export: how the model was trained, its findings and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from cwdpo.dynamics.diagnose import diagnose_rows
from cwdpo.files.writing import write_text
from cwdpo.report._page import Folder, mapping
from cwdpo.report._text import finite, number, plain, visible

Form = Literal["full", "adapter", "merged"]
"""The model next to the card: a whole model, a peft adapter, or a base model with its adapter merged."""
STAGES = ("stage1", "stage2")


def write_model_card(folder: str | Path) -> Path:
    """Write ``<folder>/model/README.md`` from the run's files."""
    run = Path(folder)
    out = run / "model" / "README.md"
    form: Form = "adapter" if (run / "model" / "adapter_config.json").is_file() else "full"
    write_text(out, model_card(run, form))
    return out


def model_card(run: Path, form: Form) -> str:
    """The card as markdown with the front matter of the hub; parts that a run does not have are left out."""
    source = Folder(run)
    recipe, summary = source.yaml("recipe.yaml"), source.json("summary.json")
    name = _line(recipe.get("name") or summary.get("name") or run.resolve().name)
    packages = mapping(source.json("environment.json").get("packages"))
    trained = " and ".join(_stages(recipe)) or "no stage"
    tuned = {"full": "full fine-tuning", "adapter": "LoRA", "merged": "LoRA, adapter merged"}[form]
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(recipe, form), sort_keys=False)}---\n",
        f"# {name}\n",
        f"Preference-tuned with cwdpo {plain(packages.get('cwdpo', ''))} in {trained}; {tuned}.\n",
        "## Findings\n",
        "".join(f"- {line}\n" for line in findings(run)),
        "## Numbers\n",
        _numbers(source.json("evaluation/evaluation.json"), summary),
        "## Recipe\n",
        f"```yaml\n{source.text('recipe.yaml').strip().replace('```', '` ` `')}\n```\n",
        "## Versions\n",
        ", ".join(f"{_line(k)} {_line(v)}" for k, v in packages.items()) + "\n",
    ]
    return "\n".join(parts)


def _front_matter(recipe: Mapping[str, Any], form: Form) -> dict[str, Any]:
    objectives = {_line(mapping(mapping(recipe.get(s)).get("objective")).get("name") or "") for s in STAGES}
    head: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": sorted({"cwdpo", "preference-optimization", *objectives} - {""}),
    }
    base = mapping(recipe.get("model")).get("path")
    return {**head, "base_model": _line(base)} if base not in ("embedded", "init", None) else head


def _stages(recipe: Mapping[str, Any]) -> list[str]:
    trained = []
    for stage, shown in zip(STAGES, ("stage 1", "stage 2"), strict=True):
        settings = mapping(recipe.get(stage))
        if settings and settings.get("enabled") is not False:
            name = _line(mapping(settings.get("objective")).get("name"))
            trained.append(f"{shown}: `{name}` at learning rate {plain(settings.get('learning_rate'))}")
    return trained


def findings(run: Path) -> list[str]:
    """The findings of the diagnosis, early stops, calibration, and problems of the data, as lines of text."""
    source = Folder(run)
    summary = source.json("summary.json")
    found = diagnose_rows(source.rows("readings.jsonl"), source.rows("metrics.jsonl"))
    lines = [
        f"{f.severity}: {f.title} ({f.stage}, from step {f.first_step}). {f.advice.strip()}" for f in found
    ] or ["The diagnosis has no findings."]
    for stage in STAGES:
        stopped = source.json(f"stopped-{stage}.json")
        if stopped:
            lines.append(_line(stopped.get("reason")))
    calibration = {k: finite(v) for k, v in source.json("calibration.json").items() if k != "n"}
    values = ", ".join(f"{_line(k)} {v:.3f}" for k, v in calibration.items() if v is not None)
    if values:
        n = plain(source.json("calibration.json").get("n"))
        lines.append(f"Calibrated on {n} samples of the reference: {values}.")
    left_out = len(source.rows("problems.jsonl"))
    if left_out:
        lines.append(
            f"{left_out} rows or examples were left out; the run's problems.jsonl lists the reasons."
        )
    readings = mapping(mapping(mapping(summary.get("stages")).get("stage2")).get("readings"))
    chosen = finite(mapping(readings.get("delta_logp/chosen")).get("value"))
    if chosen is not None:
        moved = "fell" if chosen < 0 else "rose"
        lines.append(
            f"In stage 2 the log-likelihood of held-out chosen responses {moved} by {abs(chosen):.3f} nats per token."
        )
    return lines


def _numbers(evaluation: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """A table of the evaluation's numbers and the last held-out readings of each stage."""
    rows = [(_line(name), mapping(one)) for name, one in mapping(evaluation.get("numbers")).items()]
    for stage, last in mapping(summary.get("stages")).items():
        step = plain(mapping(last).get("step"))
        for name, one in mapping(mapping(last).get("readings")).items():
            unit = plain(mapping(one).get("unit"))
            rows.append((f"{_line(stage)}, step {step}: {_line(name)} ({unit})", mapping(one)))
    lines = ["| figure | value | 95% interval | n |", "|---|---|---|---|"]
    for label, one in rows:
        if finite(one.get("value")) is None:
            continue
        low, high = finite(one.get("low")), finite(one.get("high"))
        bounds = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {label} | {number(one['value'], None)} | {bounds} | {plain(one.get('n'))} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "None were recorded.\n"


def _line(value: Any) -> str:
    """Text from a recipe or a file on one line, without characters that markdown would interpret."""
    return visible(" ".join(plain(value).split())).replace("`", "'")
