"""Writing a model: under the tensor names of its family's hub checkpoints, which other engines read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def save_weights(model: nn.Module, folder: Path) -> None:
    """``save_pretrained`` of a model, or of the adapter that it is wrapped with.

    transformers writes a model that it read from a hub checkpoint under that checkpoint's names. One that was made
    from a config it writes without the prefix ``vision_model`` of CLIP and SigLIP towers, which every hub checkpoint
    has; vLLM refuses such a folder. Here both get the hub's names.
    """
    plain: Any = model
    more: dict[str, Any] = {}
    if not hasattr(model, "peft_config"):
        use_hub_names(model)
    elif _is_resized(plain):
        more["save_embedding_layers"] = True
    with warnings.catch_warnings():
        # An adapter on embeddings is saved with the embeddings, which is what is wanted.
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        plain.save_pretrained(folder, **more)


def _is_resized(wrapped: Any) -> bool:
    """Whether the model has more or fewer tokens than the base that its adapter names.

    peft looks for ``vocab_size`` at the top of the config only, where no vision-language model has it, and would
    leave the new embeddings out.
    """
    from transformers import AutoConfig

    base = next(iter(wrapped.peft_config.values())).base_model_name_or_path
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, TypeError):
        return False
    rows = wrapped.get_base_model().get_input_embeddings().weight.shape[0]
    return bool(config.get_text_config(decoder=True).vocab_size != rows)


def use_hub_names(model: Any) -> None:
    """Have the model saved under its family's hub names; a family without a table of them keeps what it has."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, Transpose

    known = get_model_conversion_mapping(model, add_legacy=False)
    used = {_rule(one) for one in getattr(model, "_weight_conversions", None) or ()}
    # A change of prefix also reads checkpoints of other layouts: it counts where this model was read through it, and
    # for vision towers.
    kept = [
        one
        for one in known
        if not isinstance(one, PrefixChange) or one.prefix_to_remove == "vision_model" or _rule(one) in used
    ]
    for operation in (o for one in kept for o in getattr(one, "operations", ())):
        if isinstance(operation, Transpose):
            # A table that compares shapes when it reads would compare them when it writes, and leave Qwen3-VL-MoE's
            # experts as the model holds them: the other way round than the hub.
            operation.check_dims = False
    model._weight_conversions = kept or None


def _rule(one: Any) -> tuple[str, ...]:
    """What a conversion is known by: patterns and the part of the model that it is for."""
    return (*one.source_patterns, *one.target_patterns, str(one.scope_prefix))
