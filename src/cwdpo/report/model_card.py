"""The model card of a run: what was trained how, its numbers, and why it ended when it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo.dynamics.diagnose import diagnose_rows
from cwdpo.report._page import Folder, mapping
from cwdpo.report._text import finite, number, plain, visible
from cwdpo.rundir import write_text

SHOWN = ("delta_logp/chosen", "margin", "accuracy", "kl", "tv", "ece", "nll")


def write_model_card(folder: str | Path) -> Path:
    """Write ``<folder>/model/README.md`` from the run's files."""
    source = Folder(Path(folder))
    out = source.path / "model" / "README.md"
    write_text(out, model_card(source))
    return out


def model_card(source: Folder) -> str:
    """The card as markdown with the hub's front matter."""
    recipe, summary = source.yaml("recipe.yaml"), source.json("summary.json")
    name = _line(recipe.get("name") or summary.get("name") or source.path.resolve().name)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [cwdpo, dpo]",
        "---",
        "",
    ]
    lines += [f"# {name}", "", "Trained with cwdpo. The whole recipe stands at the end.", ""]
    for stage in ("stage1", "stage2"):
        settings = mapping(recipe.get(stage))
        if settings.get("enabled") is not False and settings:
            objective = mapping(settings.get("objective"))
            lines.append(
                f"- {stage}: `{_line(objective.get('name'))}`, learning rate {plain(settings.get('learning_rate'))}"
            )
        stopped = source.json(f"stopped-{stage}.json")
        if stopped:
            lines.append(f"- {_line(stopped.get('reason'))}")
    findings = diagnose_rows(source.rows("readings.jsonl"), source.rows("metrics.jsonl"))
    said = "; ".join(f"{f.title.lower()} ({f.stage}, from step {f.first_step})" for f in findings)
    lines += ["", f"Diagnosis: {said or 'healthy'}.", ""]
    for stage, found in mapping(summary.get("stages")).items():
        lines += [f"## Held out, end of {_line(stage)} (step {plain(mapping(found).get('step'))})", ""]
        lines += ["| reading | value | n |", "|---|---|---|"]
        readings = mapping(mapping(found).get("readings"))
        lines += [_row(key, mapping(readings[key])) for key in SHOWN if key in readings]
        lines.append("")
    lines += [
        "## Recipe",
        "",
        "```yaml",
        source.text("recipe.yaml").strip().replace("```", "` ` `"),
        "```",
        "",
    ]
    return "\n".join(lines)


def _row(key: str, reading: dict[str, Any]) -> str:
    value = number(reading["value"], 4) if finite(reading.get("value")) is not None else "–"
    return f"| {key} ({plain(reading.get('unit'))}) | {value} | {plain(reading.get('n'))} |"


def _line(value: Any) -> str:
    """Text from a recipe or a file on one line, without what markdown would take for more than text."""
    return visible(" ".join(plain(value).split())).replace("`", "'")
