"""Attention for shared-prefix rows, registered with transformers, and the function that switches a model to it.

The prompt part is causal and needs no mask, so the fastest kernel is used for it. Only completion tokens need a mask:
[M, P + M] instead of [P + M, P + M]. The switch is permanent: with gradient checkpointing, the layers run again in the
backward pass and must use the same attention.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cwdpo.errors import ModelError
from cwdpo.models.families import family_names, family_of
from cwdpo.models.families.base import Family
from cwdpo.models.inputs import unwrapped

Scoring = Literal["auto", "shared_prefix", "plain"]
NAME = "cwdpo_shared_prefix"
logger = logging.getLogger("cwdpo")
_NOT_HERE = ("softcap", "s_aux", "position_bias")
"""Arguments that some language models pass to their attention, and that this function does not support."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        query, key, value: [B, heads, P + M, width]; key and value may have fewer heads.
        attention_mask: [B, 1, M, P + M] for shared-prefix rows; with any other mask, transformers' SDPA is called.

    Returns:
        [B, P + M, heads, width], and ``None`` for the attention weights.

    Raises:
        ModelError: there is a cache of keys, or an argument that is not supported.
    """
    length = query.shape[2]
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.shape[-2] == length:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    if key.shape[2] != length:
        raise ModelError("shared-prefix rows cannot be scored with a cache of keys")
    for name in _NOT_HERE:
        if kwargs.get(name) is not None:
            raise ModelError(f"this language model's attention has a {name}; set model.scoring: plain")
    width = length - attention_mask.shape[-2]
    groups = query.shape[1] // key.shape[1]
    prompt = scaled_dot_product_attention(
        query[:, :, :width],
        key[:, :, :width],
        value[:, :, :width],
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    completions = scaled_dot_product_attention(
        query[:, :, width:],
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return torch.cat([prompt, completions], dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)
# Without this, transformers makes no mask for this name, and padding would not be masked in ordinary calls.
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_scoring(model: nn.Module, scoring: Scoring) -> bool:
    """Switch a model to shared-prefix scoring if it is exact and wanted.

    Args:
        model: bare or wrapped.
        scoring: ``auto`` falls back to plain scoring with one line in the log, ``shared_prefix`` does not.

    Returns:
        Whether the model is now switched to shared-prefix scoring.

    Raises:
        ModelError: ``shared_prefix`` is not possible for this model; the message says why.
    """
    inner = unwrapped(model)
    reason = "asked for" if scoring == "plain" else obstacle(inner)
    if reason is None:
        _set_text_attention(inner, NAME)
        return True
    if shares_prefix(inner):
        _set_text_attention(inner, "sdpa")
    if scoring == "shared_prefix":
        raise ModelError(f"model.scoring: shared_prefix is not possible: {reason}; set it to auto or plain")
    if scoring == "auto":
        logger.warning("scoring is plain, one full sequence per completion: %s", reason)
    return False


def obstacle(inner: Any) -> str | None:
    """Why a bare model cannot score shared-prefix rows exactly; ``None`` if it can."""
    config = inner.config
    family = family_of(config.model_type)
    if family is None:
        return f"model type {config.model_type!r} is not known; known: {', '.join(family_names())}"
    text = config.get_text_config()
    attention = text._attn_implementation
    if attention not in ("sdpa", NAME):
        return (
            f"model.attention is {attention!r}, and only sdpa can use the mask of shared-prefix rows (flash attention "
            "would use it to remove padding, eager attention would add it to the logits)"
        )
    if text is config or _text_key(config) is None:
        return "its language model has no config of its own"
    if getattr(text, "attn_logit_softcapping", None):
        return "its language model caps attention logits"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    # Without layer types, the sliding window applies to all layers unless it is switched off.
    if not getattr(text, "layer_types", None) and getattr(text, "sliding_window", None):
        kinds = {"sliding_attention"} if getattr(text, "use_sliding_window", True) else kinds
    known = {"full_attention", "sliding_attention"} if family.windowed else {"full_attention"}
    if kinds - known:
        return f"its language model has layers of type {', '.join(sorted(kinds - known))}"
    return None


def shares_prefix(model: nn.Module) -> bool:
    """Whether the model is switched to shared-prefix scoring."""
    config = getattr(unwrapped(model), "config", None)
    return config is not None and config.get_text_config()._attn_implementation == NAME


def model_family(model: nn.Module) -> Family | None:
    """The family of a model, bare or wrapped; ``None`` if it is not known."""
    config = getattr(unwrapped(model), "config", None)
    return None if config is None else family_of(config.model_type)


def _text_key(config: Any) -> str | None:
    text = config.get_text_config()
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def _set_text_attention(inner: Any, name: str) -> None:
    keys = [key for key in inner.config.sub_configs if getattr(inner.config, key, None) is not None]
    chosen = {key: getattr(inner.config, key)._attn_implementation for key in keys}
    chosen |= {"": inner.config._attn_implementation, str(_text_key(inner.config)): name}
    inner.set_attn_implementation(chosen)
