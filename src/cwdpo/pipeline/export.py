"""A run's final model as a folder that others load: adapters merged, processor beside it, a model card in front."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cwdpo.config import load_recipe
from cwdpo.dynamics.rules import KL_DRIFT
from cwdpo.errors import RunDirError
from cwdpo.models.load import load_policy
from cwdpo.rundir import RunDir, read_jsonl, replace_folder, sync_tree, write_text

CARD = "README.md"


def export(run: Path, out: Path, *, merge: bool, dtype: str | None = None) -> Path:
    """Write the final model of ``run`` to ``out``.

    A full fine-tuning is written as it is. Of a LoRA run ``merge`` adds the adapter to the base's weights (in
    float32, then cast), so that ``AutoModelForImageTextToText``, lmms-eval and vLLM load the folder without peft;
    without it the adapter is copied.

    Args:
        dtype: of merged weights; default: the base's own.

    Returns:
        ``out``.

    Raises:
        RunDirError: there is no finished run, or ``out`` is not empty.
        ModelError: the model cannot be loaded.
    """
    folder = RunDir.open(run)
    model = folder.path / "model"
    if not model.is_dir():
        raise RunDirError(f"{run}: no final model yet: finish the run with cwdpo train --resume")
    if out.exists() and any(out.iterdir()):
        raise RunDirError(f"{out} is not empty: choose another --out, or remove it first")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    adapter = (model / "adapter_config.json").is_file()
    if adapter and merge:
        _write_merged(folder, model, temporary, dtype)
    else:
        shutil.copytree(model, temporary)
    write_text(temporary / CARD, card(folder, merged=merge or not adapter))
    sync_tree(temporary)
    if out.exists():
        out.rmdir()
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(temporary, out)
    return out


def _write_merged(folder: RunDir, model: Path, out: Path, dtype: str | None) -> None:
    import torch

    settings = load_recipe(folder.path / "recipe.yaml").model.model_copy(
        update={"path": str(model), "tune": "full", "dtype": "float32", "device": "cpu", "freeze": ()}
    )
    policy = load_policy(settings)
    merged: Any = policy.model
    merged.to(getattr(torch, dtype or _dtype_of_base(model)))
    merged.save_pretrained(out)
    policy.processor.save_pretrained(out)


def _dtype_of_base(adapter: Path) -> str:
    """The dtype that the adapter's base is stored in."""
    from transformers import AutoConfig

    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    found = AutoConfig.from_pretrained(base).dtype
    return str(found or "float32").removeprefix("torch.")


def card(run: RunDir, *, merged: bool) -> str:
    """The model card: what it is, numbers, findings and the whole recipe."""
    recipe = load_recipe(run.path / "recipe.yaml")
    summary = run.json("summary.json")
    evaluation = RunDir(run.path / "evaluation").json("evaluation.json")
    base = recipe.model.path if recipe.model.path not in ("embedded", "init") else None
    head: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": [
            "cwdpo",
            "preference-optimization",
            *{s.objective["name"] for s in (recipe.stage1, recipe.stage2)},
        ],
    }
    if base:
        head["base_model"] = base
    head["tags"] = sorted(head["tags"])
    stages = [
        f"{name}: `{s.objective['name']}` at learning rate {s.learning_rate:g}"
        for name, s in (("stage 1", recipe.stage1), ("stage 2", recipe.stage2))
        if s.enabled
    ]
    packages = run.json("environment.json").get("packages", {})
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {recipe.name}\n",
        f"Preference-tuned with cwdpo {packages.get('cwdpo', '')} in {' and '.join(stages)}; "
        f"{'full fine-tuning' if recipe.model.tune == 'full' else 'LoRA'}"
        f"{', adapter merged' if merged and recipe.model.tune == 'lora' else ''}.\n",
        "## Numbers\n",
        _numbers(summary, evaluation),
        "## Findings\n",
        "\n".join(f"- {line}" for line in findings(run)) + "\n",
        "## Recipe\n",
        f"```yaml\n{recipe.to_yaml()}```\n",
        "## Versions\n",
        ", ".join(f"{k} {v}" for k, v in packages.items()) + "\n",
    ]
    return "\n".join(parts)


def _numbers(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    lines = ["| figure | value | 95% interval | n |", "|---|---|---|---|"]
    for name, found in evaluation.get("numbers", {}).items():
        if found["value"] is not None:
            bounds = "" if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}"
            lines.append(f"| {name} | {found['value']:.4g} | {bounds} | {found['n']} |")
    for stage, own in summary.get("stages", {}).items():
        for name, found in own["readings"].items():
            if found["value"] is not None:
                what = f"{stage}, step {own['step']}: {name} ({found['unit']})"
                lines.append(f"| {what} | {found['value']:.4g} | | {found['n']} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "None were recorded.\n"


def findings(run: RunDir) -> list[str]:
    """What the run's own files give reason to say: calibration, what was left out, and what moved."""
    found = []
    calibration = run.json("calibration.json")
    if calibration:
        found.append(
            f"Cooling: floor {calibration['floor']:.3f}, tau {calibration['tau']:.3f} nats per token, from "
            f"{calibration['n']} samples of the reference."
        )
    left_out = len(read_jsonl(run.path / "problems.jsonl"))
    if left_out:
        found.append(
            f"{left_out} rows or examples were left out of training; the run's problems.jsonl says why."
        )
    readings = run.json("summary.json").get("stages", {}).get("stage2", {}).get("readings", {})
    chosen = readings.get("delta_logp/chosen", {}).get("value")
    if chosen is not None:
        word = "fell" if chosen < 0 else "rose"
        found.append(
            f"Held-out chosen responses {word} in likelihood by {abs(chosen):.3f} nats per token in stage 2."
        )
    kl = readings.get("kl", {}).get("value")
    if kl is not None:
        alarm = (
            f" (above {KL_DRIFT}, where this project's studies saw collapse begin)" if kl > KL_DRIFT else ""
        )
        found.append(f"KL to the reference: {kl:.3f} nats per token{alarm}.")
    for row in run.json("diagnosis.json").get("findings", []):
        found.append(str(row.get("text") or row.get("message") or row))
    return found or ["None recorded."]
