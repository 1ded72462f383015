"""Writes a model with the tensor names of its family's hub checkpoints, which other engines read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def save_weights(model: nn.Module, folder: Path | None) -> None:
    """``save_pretrained`` of a model, or of its adapter.

    Of a sharded model, all processes call this together, and those that write nothing give no folder.

    A model that transformers loaded from a hub checkpoint is written with that checkpoint's names. A model made from a
    config is written without the prefix ``vision_model`` of CLIP and SigLIP towers, which every hub checkpoint has;
    vLLM refuses such a folder. This function writes both with the hub's names.
    """
    from cwdpo.models.sharding import is_sharded
    from cwdpo.models.write_sharded import write_adapter, write_full

    plain: Any = model
    more: dict[str, Any] = {}
    adapter = hasattr(model, "peft_config")
    if is_sharded(model):
        (write_adapter if adapter else write_full)(model, folder)
        if folder is not None:
            _let_all_read(folder)
        return
    assert folder is not None
    if not adapter:
        use_hub_names(model)
    elif _is_resized(plain):
        more["save_embedding_layers"] = True
    with warnings.catch_warnings():
        # An adapter on embeddings is saved with the embeddings; this is intended.
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        plain.save_pretrained(folder, **more)
    _let_all_read(folder)


def _let_all_read(folder: Path) -> None:
    # safetensors lets only the owner read its files: a server of another user could not load the folder.
    for file in folder.glob("*.safetensors"):
        file.chmod(next(folder.glob("*config.json")).stat().st_mode)


def _is_resized(wrapped: Any) -> bool:
    """Whether the model has more or fewer tokens than the base that its adapter names.

    peft reads ``vocab_size`` at the top level of the config only, where vision-language models do not have it, and
    would not save the new embeddings.
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
    """Set the hub's tensor names for saving; a family that transformers has no names for is not changed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, Transpose

    known = get_model_conversion_mapping(model, add_legacy=False)
    used = {_rule(one) for one in getattr(model, "_weight_conversions", None) or ()}
    # Changes of a prefix are also for reading checkpoints of other layouts. They are used for writing only if this
    # model was read with them, and for vision towers.
    kept = [
        one
        for one in known
        if not isinstance(one, PrefixChange) or one.prefix_to_remove == "vision_model" or _rule(one) in used
    ]
    for operation in (o for one in kept for o in getattr(one, "operations", ())):
        if isinstance(operation, Transpose):
            # With the check of shapes, the experts of Qwen3-VL-MoE would be written without being transposed back, so
            # not as on the hub.
            operation.check_dims = False
    model._weight_conversions = kept or None


def _rule(one: Any) -> tuple[str, ...]:
    """Key of a conversion: its patterns and the part of the model that it applies to."""
    return (*one.source_patterns, *one.target_patterns, str(one.scope_prefix))
