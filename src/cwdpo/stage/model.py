"""The policy of a run: loaded before training, saved after each stage."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from cwdpo.config import Recipe
from cwdpo.files.writing import new_folder
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.tiny import init_model
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import Splits


def load_model(recipe: Recipe, splits: Splits, run: RunDir) -> Policy:
    """The policy to train; ``path: init`` first makes a small LLaVA with a tokenizer of the data."""
    if recipe.model.path != "init":
        return load_policy(recipe.model)
    folder = run.path / "init"
    if not folder.exists():
        with new_folder(folder) as temporary:
            init_model(temporary, splits.texts, recipe.model.init)
        # A process that finds the folder draws nothing to make it: a new adapter must start alike in both.
        set_seed(recipe.seed)
    return load_policy(recipe.model.model_copy(update={"path": str(folder)}))


def save_model(policy: Policy, folder: Path, run: RunDir) -> None:
    """Write the model (or its adapter) and the processor; a half-written folder never has the final name."""
    if not run.writes:
        return
    with new_folder(folder) as temporary:
        policy.model.save_pretrained(temporary)  # type: ignore[operator]
        policy.processor.save_pretrained(temporary)
