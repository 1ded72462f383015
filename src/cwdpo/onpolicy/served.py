"""The LoRA adapter of a round, as a server loads it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from torch import nn

from cwdpo.errors import RecipeError
from cwdpo.models.parts import PARTS
from cwdpo.remote import Adapter

_WEIGHTS = "adapter_model.safetensors"


def adapter_of(folder: Path) -> Adapter:
    """The adapter in a folder. Its name has a digest of its weights: a name stands for the same weights always."""
    weights = folder / _WEIGHTS
    digest = ""
    if weights.is_file():
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:12]
    return Adapter(f"{folder.parent.name}-{folder.name}-{digest}", folder)


def check_served_parts(model: nn.Module) -> None:
    """Check that the adapter has layers of the language model only: vLLM silently leaves out all others.

    Raises:
        RecipeError: it has layers of the vision tower or the projector.
    """
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for part in ("vision", "projector"):
        found = next((name for name in trained if re.search(PARTS[part], name)), None)
        if found is not None:
            raise RecipeError(
                f"negatives.sampler.serve_adapter: the adapter has layers of the {part} ({found}), which vLLM leaves "
                "out without a word: its samples would be of another policy. Set model.freeze to [vision, projector], "
                "or sample in this process (leave out negatives.sampler.server)"
            )
