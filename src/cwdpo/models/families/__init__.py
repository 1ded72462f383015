"""The known model families by ``config.model_type``.

To add one: a line in :data:`FAMILIES`, and, if it needs its own positions, masks or inputs, a class in a new file here.
"""

from __future__ import annotations

from cwdpo.models.families.base import Family
from cwdpo.models.families.blocks import Gemma3, Gemma4, PaliGemma
from cwdpo.models.families.llava_onevision import LlavaOnevision
from cwdpo.models.families.mllama import Mllama
from cwdpo.models.families.mrope import Glm4v, MRope

FAMILIES: dict[str, Family] = {
    "gemma3": Gemma3(),
    "gemma4": Gemma4(),
    "glm4v": Glm4v(),
    "idefics3": Family(),
    "internvl": Family(),
    "lfm2_vl": Family(),
    "llava": Family(),  # also with Pixtral's vision tower
    "llava_next": Family(),
    "llava_onevision": LlavaOnevision(),
    "mistral3": Family(),
    "mllama": Mllama(),
    "paligemma": PaliGemma(),
    "qwen2_5_vl": MRope(),
    "qwen2_vl": MRope(),
    "qwen3_5": MRope(),
    "qwen3_vl": MRope(),
    "qwen3_vl_moe": MRope(),
    "smolvlm": Family(),
}
"""Every family here is compared with the model's own logits by `make test-families`."""


def family_names() -> list[str]:
    """The known model types, sorted."""
    return sorted(FAMILIES)


def family_of(model_type: str) -> Family | None:
    """The family of a model type; ``None`` if it is not known."""
    return FAMILIES.get(model_type)
