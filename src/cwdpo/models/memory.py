"""Bytes that a training run keeps on its device, by part, from a model's shapes alone; activations are not counted."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cwdpo.arguments import Optimizer
from cwdpo.models.adapter import add_lora
from cwdpo.models.load import freeze
from cwdpo.models.quantization import left_out

if TYPE_CHECKING:
    from torch import nn

    from cwdpo.models.settings import ModelSettings

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Weights with one scale in nf4, and scales with one scale of their own in double quantization."""
TABLES = 16 * 4
"""The 16 values of nf4, which each layer keeps in float32."""
TABLES_OF_SCALES = 256 * 4 + 4
"""The 256 values of quantized scales, and their mean."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    ``weights`` are those of the base in a floating dtype, ``quantized`` those in 4 or 8 bits with their scales,
    ``adapters`` the LoRA weights, ``gradients`` and ``optimizer`` those of what is trained (AdamW: two moments), and
    ``dequantized`` the largest layer while it computes.
    """

    weights: int
    quantized: int
    adapters: int
    gradients: int
    optimizer: int
    dequantized: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        trained = self.adapters + self.gradients + self.optimizer
        return self.weights + self.quantized + trained + self.dequantized


def empty_model(config: Any, dtype: str, attention: str | None = None) -> nn.Module:
    """A model of a configuration on the meta device: shapes without memory.

    Args:
        config: transformers' configuration of a vision-language model.
        dtype: of its weights, for instance ``bfloat16``.
        attention: transformers' attention implementation; default: its own choice.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    return model


def planned_memory(model: Any, settings: ModelSettings, optimizer: Optimizer = "adamw") -> Memory:
    """The memory of training a model with some settings.

    Args:
        model: the bare model, not quantized, for instance from :func:`empty_model`; adapters are added to it.
        settings: what is trained, quantized and frozen. Weights have the model's dtype.
        optimizer: ``train.optimizer``.

    Raises:
        ModelError: the settings do not fit the model.
    """
    return planned_model(model, settings, optimizer)[1]


def planned_model(
    model: Any, settings: ModelSettings, optimizer: Optimizer = "adamw"
) -> tuple[nn.Module, Memory]:
    """The model with its adapters and frozen parts, and its memory; see :func:`planned_memory`."""
    quantized = quantized_by(model, settings)
    sizes = {id(layer.weight): _bytes(layer, settings) for layer in quantized}
    largest = max((layer.weight.numel() for layer in quantized), default=0)
    computed = _size(settings.quantization_options.compute_dtype, model)
    if settings.quantization == "int8" and computed < 4:
        computed += 4  # bitsandbytes dequantizes to float32, which is cast
    freeze(model, settings.freeze)
    wrapped = add_lora(model, settings) if settings.tune == "lora" else model
    weights = adapters = gradients = 0
    for name, parameter in wrapped.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if ".lora_" in name:
            adapters += size
        elif id(parameter) not in sizes:
            weights += size
        if parameter.requires_grad:
            gradients += size
    states = 3 if optimizer == "adamw_kahan" else 2
    memory = Memory(weights, sum(sizes.values()), adapters, gradients, states * gradients, largest * computed)
    return wrapped, memory


def quantized_by(model: Any, settings: ModelSettings) -> list[Any]:
    """The linear layers that would be quantized."""
    from torch import nn

    if settings.quantization is None:
        return []
    skipped = "|".join(left_out(settings))
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not re.search(skipped, name)
    ]


def _bytes(layer: Any, settings: ModelSettings) -> int:
    """Bytes of a layer's weight in 4 or 8 bits, with its scales."""
    numbers = int(layer.weight.numel())
    if settings.quantization == "int8":
        return numbers + int(4 * layer.out_features)
    blocks = math.ceil(numbers / BLOCK)
    packed = math.ceil(numbers / 2) + TABLES
    if settings.quantization_options.double_quantization is False:
        return packed + 4 * blocks
    return packed + blocks + 4 * math.ceil(blocks / BLOCK_OF_SCALES) + TABLES_OF_SCALES


def _size(name: str, model: Any) -> int:
    """Bytes of a number of a dtype; ``auto`` is the model's."""
    import torch

    dtype: torch.dtype = model.get_input_embeddings().weight.dtype if name == "auto" else getattr(torch, name)
    return int(dtype.itemsize)
