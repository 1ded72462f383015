"""The model card of a run and of its export: how the model was trained, its findings and its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml

from cwdpo.dynamics.diagnose import diagnose_rows
from cwdpo.files.writing import write_text
from cwdpo.hub import hub_data
from cwdpo.report._page import Folder, mapping, records
from cwdpo.report._text import finite, interval_text, number, plain, visible

Form = Literal["full", "adapter", "merged"]
"""The model next to the card: a whole model, a peft adapter, or a base model with its adapter merged."""
STAGES = ("stage1", "stage2")
KEPT = (
    "accuracy", "margin", "delta_logp/chosen", "delta_logp/rejected", "nll", "kl", "entropy", "top1", "ece",
    "cooling/cooled",
)  # fmt: skip
"""Last readings that the card has; the report has all."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_LOAD = """from transformers import AutoModelForImageTextToText, AutoProcessor
"""
_ANSWER = """processor = AutoProcessor.from_pretrained(MODEL)
image = {{"type": "image", "path": "photo.jpg"}}
chat = [{{"role": "user", "content": [image, {{"type": "text", "text": "Describe the image."}}]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_USE = {
    "whole": f"""```python
{_LOAD}
MODEL = "."  # this folder, or its id on the hub
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto")
{_ANSWER}```

With vLLM: `vllm serve MODEL`. Benchmarks: `cwdpo evaluate MODEL --data rows.jsonl --lmms-eval TASKS --lmms-model KIND`.
""",
    "adapter": f"""```python
from peft import PeftModel
{_LOAD}
MODEL = "."  # this folder, or its id on the hub
base = AutoModelForImageTextToText.from_pretrained("{{base}}", dtype="auto")
model = PeftModel.from_pretrained(base, MODEL)
{_ANSWER}```

Other programs, such as vLLM, need it merged: `cwdpo export RUN --merge --out FOLDER`.
""",
}
_METHOD = """Cooling-Weighted DPO, from "Learning Dynamics of VLM Finetuning"
([arXiv 2510.11978](https://arxiv.org/abs/2510.11978)), as cwdpo implements it.

```bibtex
@article{arxiv2510.11978,
  title = {Learning Dynamics of VLM Finetuning},
  journal = {arXiv preprint arXiv:2510.11978},
  year = {2025}
}
```
"""


def write_model_card(folder: str | Path) -> Path:
    """Write ``<folder>/model/README.md`` from the run's files."""
    run = Path(folder)
    out = run / "model" / "README.md"
    form: Form = "adapter" if (run / "model" / "adapter_config.json").is_file() else "full"
    write_text(out, model_card(run, form))
    return out


def model_card(run: Path, form: Form) -> str:
    """The card as markdown with the front matter of the hub; parts that a run does not have are left out.

    Places on this machine are named by their last part only.
    """
    source = Folder(run)
    recipe, summary = source.yaml("recipe.yaml"), source.json("summary.json")
    name = _line(recipe.get("name") or summary.get("name") or run.resolve().name)
    packages = mapping(source.json("environment.json").get("packages"))
    trained = " and ".join(_stages(recipe)) or "no stage"
    tuned = {"full": "full fine-tuning", "adapter": "LoRA", "merged": "LoRA, adapter merged"}[form]
    shown = yaml.safe_dump(_without_places(recipe), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{_front_matter(recipe, form)}\n---\n",
        f"# {name}\n",
        f"Preference-tuned with cwdpo {plain(packages.get('cwdpo', ''))} in {trained}; {tuned}.\n",
        "## Use\n",
        _USE["adapter" if form == "adapter" else "whole"].format(base=_hub_id(_base(recipe)) or "BASE"),
        "## Findings\n",
        "".join(f"- {line}\n" for line in findings(run)),
        "## Numbers\n",
        _numbers(source.json("evaluation/evaluation.json"), summary),
        "## Recipe\n",
        f"```yaml\n{shown.strip().replace('```', '` ` `')}\n```\n",
        "## Versions\n",
        ", ".join(f"{_line(k)} {_line(v)}" for k, v in packages.items()) + "\n",
        "## Method\n",
        _METHOD,
    ]
    return "\n".join(parts)


def _front_matter(recipe: Mapping[str, Any], form: Form) -> str:
    objectives = {_line(mapping(mapping(recipe.get(s)).get("objective")).get("name") or "") for s in STAGES}
    data = mapping(recipe.get("data"))
    found = (_hub_data(mapping(one).get("path")) for one in (data, *records(data.get("sources"))))
    head: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": sorted({"cwdpo", "preference-optimization", *objectives} - {""}),
        "base_model": _hub_id(_base(recipe)),
        "datasets": list(dict.fromkeys(name for name in found if name)),
    }
    return yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False).strip()


def _base(recipe: Mapping[str, Any]) -> Any:
    return mapping(recipe.get("model")).get("path")


def _hub_id(value: Any) -> str | None:
    """The text if it is an id of the hub, ``OWNER/NAME``, and not a place on this machine."""
    return value if isinstance(value, str) and _HUB_ID.fullmatch(value) and not Path(value).exists() else None


def _hub_data(value: Any) -> str | None:
    """The id of a data set of the hub, without revision, configuration and split."""
    place = hub_data(value) if isinstance(value, str) and not Path(value).exists() else None
    return None if place is None else _hub_id(place.id)


def _without_places(value: Any) -> Any:
    """The recipe with the last part of each absolute path alone."""
    if isinstance(value, Mapping):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    if isinstance(value, str) and (value.startswith("~") or PurePath(value).is_absolute()):
        return PurePath(value).name
    return value


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
    stored = source.json("calibration.json")
    values = "; ".join(
        f"{_line(k)} {v:.3f}{interval_text(stored, k)}" for k, v in calibration.items() if v is not None
    )
    if values:
        n = plain(stored.get("n"))
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
    """A table of the evaluation's numbers and the last of the main held-out readings of each stage."""
    rows = [(_line(name), mapping(one)) for name, one in mapping(evaluation.get("numbers")).items()]
    for stage, last in mapping(summary.get("stages")).items():
        step = plain(mapping(last).get("step"))
        readings = mapping(mapping(last).get("readings"))
        for name, one in ((name, readings[name]) for name in KEPT if name in readings):
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
