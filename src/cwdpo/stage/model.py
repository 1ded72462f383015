"""The policy of a run: loaded before training, saved after each stage."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import set_seed

from cwdpo.config import Recipe
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.tiny import init_model
from cwdpo.models.write import save_weights
from cwdpo.rundir import RunDir, replace_folder, sync_tree
from cwdpo.stage.splits import Splits


def load_model(recipe: Recipe, splits: Splits, run: RunDir) -> Policy:
    """The policy to train; ``path: init`` first makes a small LLaVA with a tokenizer of the data."""
    if recipe.model.path != "init":
        return load_policy(recipe.model)
    folder = run.path / "init"
    if not folder.exists():
        temporary = folder.with_name(".init.tmp")
        init_model(temporary, splits.texts, recipe.model.init)
        sync_tree(temporary)
        replace_folder(temporary, folder)
        # A process that finds the folder draws nothing to make it: a new adapter must start alike in both.
        set_seed(recipe.seed)
    return load_policy(recipe.model.model_copy(update={"path": str(folder)}))


def save_model(policy: Policy, folder: Path, run: RunDir) -> None:
    """Write the model (or its adapter) and the processor; a half-written folder never has the final name."""
    if not run.writes:
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_weights(policy.model, temporary)
    policy.processor.save_pretrained(temporary)
    sync_tree(temporary)
    replace_folder(temporary, folder)
