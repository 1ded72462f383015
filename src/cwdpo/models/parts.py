"""Parts of a vision-language model, as patterns of the parameter names of all families."""

from __future__ import annotations

import re
from collections.abc import Iterable

PARTS = {
    "vision": r"(vision_tower|vision_model|visual|vision_encoder|image_encoder)\b",
    "projector": (
        r"(multi_modal_projector|mm_projector|connector|merger|modality_projection|image_newline|embed_vision)\b"
    ),
    "text": r"(language_model|text_model|lm_head)\b",
}


def patterns_of(names: Iterable[str]) -> dict[str, str]:
    """Part, or piece of a name -> regular expression to search names with."""
    return {name: PARTS.get(name, re.escape(name)) for name in names}
