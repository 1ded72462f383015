"""Weights in 4 or 8 bits by bitsandbytes: how a model is loaded with them, computes, and gets whole weights again.

Only weights are quantized. Every layer dequantizes its weight and computes in a floating dtype, in training and in
evaluation mode alike, so policy, reference, shared-prefix and plain rows compute the same function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cwdpo.errors import ModelError
from cwdpo.models.inputs import unwrapped
from cwdpo.models.parts import patterns_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cwdpo.models.settings import ModelSettings

NEVER = ("lm_head", "patch_embed")
"""Parts of names of layers that are never quantized. Rounding errors of the output head would reach the
log-probabilities directly. A vision tower whose first layer is linear (SigLIP 2 in LFM2-VL) casts the picture to the
dtype of that layer's weight: to bytes, if it is quantized."""
_WEIGHTS = ("Params4bit", "Int8Params")
"""bitsandbytes' types of weights, by name: it need not be installed."""


def check_quantization(settings: ModelSettings, config: Mapping[str, Any], source: str) -> None:
    """Refuse settings that a checkpoint's own quantization contradicts.

    Args:
        settings: the recipe's section ``model``.
        config: the checkpoint's config.json.
        source: its name, for the message.

    Raises:
        ModelError: the checkpoint is quantized, and the recipe asks to quantize it again or to train its weights.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return
    method = stored.get("quant_method", "unknown method")
    if method == "gguf":
        raise ModelError(
            f"model.path {source!r}: its config.json says that it was read from a GGUF file, and transformers "
            "trains no such model: if its weights are safetensors, they are no longer quantized: remove "
            "quantization_config from config.json"
        )
    if settings.quantization is not None:
        raise ModelError(
            f"model.quantization: {settings.quantization}: the weights of {source!r} are quantized already ({method}): "
            "leave it out, or name the checkpoint that was quantized in model.path"
        )
    if settings.tune == "full":
        raise ModelError(
            f"model.tune: full: the weights of {source!r} are quantized ({method}) and cannot be trained: set "
            "model.tune to lora, or name the checkpoint that was quantized in model.path"
        )


def load_options(settings: ModelSettings, config: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a quantized model; none for other models.

    Weights are quantized while they are loaded, on ``device``, so the whole model is never in memory unquantized.

    Args:
        settings: the recipe's section ``model``.
        config: the checkpoint's config.json.
        device: where the model will be.
    """
    if settings.quantization is None:
        return {"device_map": {"": device}} if config.get("quantization_config") else {}
    from transformers import BitsAndBytesConfig

    options = settings.quantization_options
    # transformers matches from the start of a module's name.
    skip = [f".*(?:{pattern}).*" for pattern in left_out(settings)]
    if settings.quantization == "int8":
        asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=options.double_quantization is not False,
            llm_int8_skip_modules=skip,
        )
    return {"quantization_config": asked, "device_map": {"": device}}


def left_out(settings: ModelSettings) -> list[str]:
    """Patterns of the names of linear layers that are not quantized."""
    return [*NEVER, *patterns_of(settings.quantization_options.skip).values()]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer that bitsandbytes quantized."""
    for name, module in model.named_modules():
        quantized = type(getattr(module, "weight", None)).__name__ in _WEIGHTS
        if quantized and not hasattr(module, "base_layer"):  # peft's layers show their base's weight
            yield name, module


def quantization_of(model: nn.Module) -> str | None:
    """How a model is quantized, bare or wrapped: ``nf4``, ``int8`` or another package's name; else ``None``."""
    kinds = (layer.weight for _, layer in quantized_layers(model))
    first: Any = next(kinds, None)
    if first is not None:
        return getattr(first, "quant_type", "int8")
    method = getattr(unwrapped(model), "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))


def use_exact_layers(model: Any, settings: ModelSettings) -> None:
    """Make quantized layers compute the same in both modes, and set the dtype that they compute in.

    Args:
        model: a loaded model without adapters; one without quantized layers is not changed.
        settings: its quantization and its options.

    Raises:
        ModelError: a name in ``quantization_options.skip`` matches no linear layer.
    """
    import torch

    options = settings.quantization_options
    _check_skipped(model, options.skip)
    chosen = None if options.compute_dtype == "auto" else getattr(torch, options.compute_dtype)
    if chosen is None and settings.quantization is not None:
        chosen = model.get_input_embeddings().weight.dtype
    for _, layer in quantized_layers(model):
        from cwdpo.models.quantized_linear import computes_in

        computes_in(layer, chosen)


def _check_skipped(model: nn.Module, skip: tuple[str, ...]) -> None:
    from torch import nn

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for part, pattern in patterns_of(skip).items():
        if not any(re.search(pattern, name) for name in names):
            tops = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ModelError(
                f"model.quantization_options.skip: {part!r} matches no linear layer; the model has: {', '.join(tops)}"
            )


def state_of_layers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of everything beside its weight that a quantized layer's output depends on.

    For weights that another package than bitsandbytes quantized (GPTQ, AWQ), these are the model's buffers.
    """
    for name, layer in quantized_layers(model):
        from cwdpo.models.quantized_linear import state_of

        for key, value in sorted(state_of(layer).items()):
            yield f"{name}.{key} {getattr(layer, 'compute_dtype', None)}", value
    if getattr(model, "quantization_method", None) not in (None, "bitsandbytes"):
        yield from model.named_buffers()


def is_rounded(model: nn.Module) -> bool:
    """Whether a model computes in less than float32, in any of its layers."""
    import torch

    half = (torch.bfloat16, torch.float16)
    computed = (getattr(layer, "compute_dtype", None) for _, layer in quantized_layers(model))
    return any(dtype in half for dtype in (*(p.dtype for p in model.parameters()), *computed))


def dequantized(model: Any) -> nn.Module:
    """The model with float32 linear layers in place of quantized ones; nothing else is changed, and nothing rounded.

    Args:
        model: a bare model, after :func:`use_exact_layers`; it is changed in place.

    Raises:
        ModelError: another package than bitsandbytes quantized it.
    """
    import torch
    from torch import nn
    from transformers.core_model_loading import PrefixChange

    if not any(quantized_layers(model)):
        raise ModelError(
            f"weights that {quantization_of(model)} quantized cannot be written as ordinary ones: export the "
            "adapter without --merge, or set base_model_name_or_path in its adapter_config.json to the checkpoint that "
            "was quantized"
        )
    from cwdpo.models.quantized_linear import dense_weight

    for name, layer in list(quantized_layers(model)):
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(dense_weight(layer, torch.float32))
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().float())
        model.set_submodule(name, plain.train(layer.training))
    # Removed with the rest, though they are of the checkpoint's layout: without them the model would be written with
    # other names.
    prefixes = [
        one for one in getattr(model, "_weight_conversions", None) or () if isinstance(one, PrefixChange)
    ]
    model.hf_quantizer.remove_quantization_config(model)
    model._weight_conversions = prefixes or None
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, flag):
            setattr(model, flag, False)
    return model  # type: ignore[no-any-return]
