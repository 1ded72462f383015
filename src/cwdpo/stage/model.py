"""The policy of a run: loaded before training, saved after each stage."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import set_seed

from cwdpo.config import Recipe
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.tiny import init_model
from cwdpo.rundir import RunDir, replace_folder, sync_tree
from cwdpo.stage.splits import Splits


def load_model(recipe: Recipe, splits: Splits, run: RunDir) -> Policy:
    """Load the policy; ``path: init`` first creates a small LLaVA model with a tokenizer trained on the data."""
    if recipe.model.path != "init":
        return load_policy(recipe.model)
    folder = run.path / "init"
    if not folder.exists():
        temporary = folder.with_name(".init.tmp")
        init_model(temporary, splits.texts, recipe.model.init)
        sync_tree(temporary)
        replace_folder(temporary, folder)
        # Creating the model used random numbers; a run that finds the folder uses none. Set the seed again, so that a
        # new adapter starts with the same weights in both cases.
        set_seed(recipe.seed)
    return load_policy(recipe.model.model_copy(update={"path": str(folder)}))


def save_model(policy: Policy, folder: Path, run: RunDir) -> None:
    """Write the model (or its adapter) and the processor; the folder gets its name only when it is complete."""
    if not run.writes:
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    policy.model.save_pretrained(temporary)  # type: ignore[operator]
    policy.processor.save_pretrained(temporary)
    sync_tree(temporary)
    replace_folder(temporary, folder)
