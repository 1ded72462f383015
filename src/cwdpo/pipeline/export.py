"""A run's final model as a folder that others load: adapters merged, processor beside it, a model card in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo.config import stored_model
from cwdpo.errors import RunDirError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import refuse_damage
from cwdpo.files.reading import read_object
from cwdpo.files.writing import copy_folder, new_folder, write_text
from cwdpo.models.load import load_policy
from cwdpo.report.model_card import Form, model_card
from cwdpo.rundir import RunDir

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
    refuse_damage(model, "finish the run again: remove the folder, then cwdpo train --resume")
    if out.exists() and any(out.iterdir()):
        raise RunDirError(f"{out} is not empty: choose another --out, or remove it first")
    adapter = (model / "adapter_config.json").is_file()
    with new_folder(out) as temporary:
        if adapter and merge:
            _write_merged(folder, model, temporary, dtype)
        else:
            copy_folder(model, temporary)
            (temporary / CHECKSUMS).unlink(missing_ok=True)  # the export is another's from here on
        form: Form = "full" if not adapter else "merged" if merge else "adapter"
        write_text(temporary / CARD, model_card(folder.path, form))
    return out


def _write_merged(folder: RunDir, model: Path, out: Path, dtype: str | None) -> None:
    import torch

    settings = stored_model(folder.path / "recipe.yaml").model_copy(
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

    base = read_object(adapter / "adapter_config.json")["base_model_name_or_path"]
    found = AutoConfig.from_pretrained(base).dtype
    return str(found or "float32").removeprefix("torch.")
