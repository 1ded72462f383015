"""Linear layers with quantized weights that compute in a floating dtype. Imports bitsandbytes.

bitsandbytes' own layers are not used for computing, because policy and reference would differ before the first update:

- Its 8-bit layer rounds the activations too. Then a token's output depends on the other tokens of its batch (which
  columns are outliers) and, on a CPU, on the mode: in training mode they are not rounded. The layer also keeps its
  input for the backward pass, which gradient checkpointing cannot free.
- Its 4-bit layer, on CPUs with AVX512-BF16, packs the weights at the first call in evaluation mode; packed ones
  compute in bf16 and have no gradient. And on a CPU, weights come back wrong where a block reaches into the next row.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor
from torch.nn.functional import linear


class _Dequantized(torch.autograd.Function):
    """``x @ weight.T`` with the weight dequantized for the moment, here and in the backward pass; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return linear(x, dense_weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dense_weight(ctx.layer, gradient.dtype), None


def _forward(layer: Any, x: Tensor) -> Tensor:
    made: Tensor = _Dequantized.apply(x.to(layer.compute_dtype or x.dtype), layer)
    made = made if layer.bias is None else made + layer.bias.to(made.dtype)
    return made.to(x.dtype)


class Int8Linear(Linear8bitLt):  # type: ignore[misc]
    """A layer with 8-bit weights that computes in ``compute_dtype``, or else in the dtype of its input."""

    compute_dtype: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _forward(self, x)


class Nf4Linear(Linear4bit):  # type: ignore[misc]
    """A layer with 4-bit weights that computes in ``compute_dtype``; on a GPU by bitsandbytes' kernels."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if x.device.type == "cpu":
            return _forward(self, x)
        made: Tensor = super().forward(x)
        return made


def computes_in(layer: Any, dtype: torch.dtype | None) -> None:
    """Turn a loaded layer of bitsandbytes into one of this file, in place.

    Args:
        layer: with weights that are quantized.
        dtype: what it computes in; ``None`` for its own dtype (4 bits) or that of its input (8 bits).
    """
    if isinstance(layer, Linear8bitLt):
        if layer.weight.SCB is not None:
            layer.init_8bit_state()  # the scales then lie where peft looks for them
        layer.__class__, layer.compute_dtype = Int8Linear, dtype
        return
    layer.__class__ = Nf4Linear
    if dtype is not None:
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
    if layer.bias is not None and layer.compute_dtype is not None:
        # bitsandbytes does it in the first forward pass, and the model's digest would differ from then on.
        layer.bias.data = layer.bias.data.to(layer.compute_dtype)


def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] weight that a layer computes with, in a floating dtype; float32 holds it exactly."""
    if isinstance(layer, Linear8bitLt):
        whole: Tensor = int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
        return whole.to(dtype)
    state = copy(layer.weight.quant_state)
    shape, state.dtype = state.shape, dtype
    # With rows of one block each, no block reaches into the next row.
    count, size = shape.numel(), state.blocksize
    state.shape = torch.Size((count // size, size) if count % size == 0 else (1, count))
    made: Tensor = dequantize_4bit(layer.weight.data, state)
    return made.reshape(shape)


def misread_on_cpu(layer: Any) -> bool:
    """Whether bitsandbytes, asked by another package, would give wrong weights of this layer."""
    if isinstance(layer, Linear8bitLt) or layer.weight.device.type != "cpu":
        return False
    return bool(layer.in_features % layer.weight.quant_state.blocksize)


def state_of(layer: Any) -> dict[str, Tensor]:
    """Everything beside its weight that a layer's dense weight depends on."""
    if isinstance(layer, Linear8bitLt):
        return {"scale": layer.weight.SCB if layer.state.SCB is None else layer.state.SCB}
    found: dict[str, Tensor] = layer.weight.quant_state.as_dict(packed=True)
    return found
