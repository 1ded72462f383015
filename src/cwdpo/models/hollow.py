"""A hollow model: all shapes of a model, its adapters and quantized layers, and no numbers.

Its parameters are torch's fake tensors. Every operation on them gives the shape, dtype and memory of its result, and
computes nothing. So the code of a training step runs as it is, on a machine that could not hold the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from cwdpo.arguments import Optimizer
from cwdpo.models.checkpoint import quiet
from cwdpo.models.load import disable_dropout
from cwdpo.models.memory import Memory, empty_model, planned_model, quantized_by
from cwdpo.models.shared_attention import use_scoring

if TYPE_CHECKING:
    from cwdpo.models.settings import ModelSettings


def hollow_model(
    config: Any, settings: ModelSettings, optimizer: Optimizer = "adamw"
) -> tuple[nn.Module, Memory]:
    """A model to train as ``settings`` say, without numbers, and what it keeps on its device.

    Args:
        config: transformers' configuration of the checkpoint; it is changed (attention).
        settings: the recipe's section ``model``; with ``dtype: auto``, LoRA takes the dtype of the configuration.
        optimizer: ``train.optimizer``.

    Raises:
        ModelError: the settings do not fit the model.
    """
    with quiet():
        bare: Any = empty_model(config, dtype_of(config, settings), settings.attention)
    disable_dropout(bare)
    quantized = {id(layer) for layer in quantized_by(bare, settings)}
    model, memory = planned_model(bare, settings, optimizer)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in quantized:
                setattr(parent, name, _HollowQuantized(child, settings))
    _empty(model)
    use_scoring(model, settings.scoring)
    return model, memory


def dtype_of(config: Any, settings: ModelSettings) -> str:
    """The dtype of the weights by name; a configuration without one means float32, as in transformers."""
    if settings.load_dtype != "auto":
        return settings.load_dtype
    for one in (config, config.get_text_config()):
        if getattr(one, "dtype", None) is not None:
            return str(one.dtype).removeprefix("torch.")
    return "float32"


def _empty(model: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors on the CPU; tied weights stay tied."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[
        int, tuple[Tensor, Tensor]
    ] = {}  # the replaced tensor is kept, so that its id is not used again

    def hollow(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with fake:
                one: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                one = nn.Parameter(one, requires_grad=tensor.requires_grad)
            made[id(tensor)] = one, tensor
        return made[id(tensor)][0]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    held[name] = hollow(tensor)


class _HollowQuantized(nn.Linear):
    """In place of a layer with weights in 4 or 8 bits: it dequantizes for the moment, see ``quantized_linear.py``."""

    def __init__(self, layer: Any, settings: ModelSettings) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        bits = 8 if settings.quantization == "int8" else 4
        packed = torch.empty(
            self.in_features * self.out_features * bits // 8, dtype=torch.uint8, device="meta"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.through_float32 = bits == 8
        asked = settings.quantization_options.compute_dtype
        self.compute_dtype = layer.weight.dtype if asked == "auto" else getattr(torch, asked)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        made: Tensor = _Dequantized.apply(x.to(self.compute_dtype), self)
        made = made if self.bias is None else made + self.bias.to(made.dtype)
        return made.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] memory of the weight while the layer computes."""
        shape = self.out_features, self.in_features
        if self.through_float32:
            return self.weight.new_empty(shape, dtype=torch.float32).to(dtype)
        return self.weight.new_empty(shape, dtype=dtype)


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _HollowQuantized) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dense(gradient.dtype), None


class KnownIndices(TorchDispatchMode):
    """Lets hollow tensors be indexed by masks that have numbers, such as those of image tokens.

    Token ids, masks and image grids of a hollow step are ordinary tensors. An index by a mask has a size that depends
    on its values, which fake tensors refuse even if the values are known.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and torch's guard against that costs as much as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; a mask with numbers becomes the indices of its true places."""
        if func in _INDEXING and isinstance(args[0], FakeTensor):
            indices: list[Any] = []
            for index in args[1]:
                known = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
                masks = known and index.dtype == torch.bool
                indices += index.nonzero().unbind(1) if masks else [index]
            args = (args[0], indices, *args[2:])
        return func(*args, **(kwargs or {}))


_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}
