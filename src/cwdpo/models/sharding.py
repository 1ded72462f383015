"""Models whose parameters are divided over the processes of a run (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cwdpo.errors import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has divided the model's parameters: every forward pass then needs all processes."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself if it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All values of a sharded tensor, or the tensor itself if it is not sharded. All processes call this together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_no_more(model: nn.Module) -> None:
    """Free the parameters that were gathered for a forward pass without a backward pass behind it."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def from_part(part: Tensor, like: Any) -> Tensor:
    """A sharded tensor of this process's part, divided as ``like`` is."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def in_parts() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` with which every process reads its part of each tensor, and no more."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=torch.distributed.get_world_size())}


@torch.no_grad()
def copy_parts(source: nn.Module, target: nn.Module) -> None:
    """Copy this process's parts of all parameters of one sharded model into those of another, in place."""
    parts = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        local_part(parameter.detach()).copy_(local_part(parts[name].detach()))


@torch.no_grad()
def copy_whole(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, which every process has, into sharded or whole ones of the same names, in place."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, target in into.items():
        value = values[name].to(target.device, target.dtype)
        if isinstance(target, DTensor):  # without a source, nothing is sent: each process takes its part
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)


def anything(tensors: Iterable[Tensor]) -> bool:
    """Whether any value is not zero; of sharded tensors all processes call this together."""
    return any(bool(whole(tensor).any()) for tensor in tensors)


def most_gathered(model: nn.Module, *, trained: bool) -> int:
    """Upper bound of the bytes that FSDP2 gathers on a process at once, beside its part of the weights.

    While a layer computes, the next one is gathered into a buffer and copied out of it: three layers. What is in no
    layer (embeddings, head) is gathered for the whole pass, through a buffer of its own; if it is trained, its gradient
    comes in addition. Measured in docs/distributed.md.

    Args:
        model: not sharded; its layers are those of its class's ``_no_split_modules``.
        trained: whether the base's weights are trained.
    """
    layers, rest = _layer_sizes(model)
    return (3 if trained else 2) * rest + 3 * max(layers, default=0)


def gathered_in_step(model: nn.Module) -> int:
    """Upper bound of the bytes that FSDP2 gathers on a process for a micro-batch, its own part included.

    Everything once for the forward pass, and every layer again for the backward pass. What is in no layer stays
    gathered between the two. A frozen vision tower that is not computed again is gathered once only, so it may be less.
    Measured in docs/distributed.md.
    """
    layers, rest = _layer_sizes(model)
    return rest + 2 * sum(layers)


def _layer_sizes(model: nn.Module) -> tuple[list[int], int]:
    """Bytes of each layer that FSDP2 shards by itself, and of the rest."""
    names = _layer_classes(model)
    inside: set[int] = set()
    layers = []
    for module in model.modules():  # outer modules come first
        own = {id(p): p for p in module.parameters()}
        if type(module).__name__ in names and not own.keys() <= inside:
            inside |= own.keys()
            layers.append(sum(map(_bytes, own.values())))
    return layers, sum(_bytes(p) for p in model.parameters() if id(p) not in inside)


def _layer_classes(model: nn.Module) -> set[str]:
    """Names of the classes of layers that FSDP2 shards one by one: of transformers' list, those that the model has."""
    known = {type(module).__name__ for module in model.modules()}
    return known & set(getattr(model, "_no_split_modules", None) or ())


def _bytes(tensor: Tensor) -> int:
    size: int = tensor.numel() * tensor.element_size()
    return size


def check_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Set the layers that FSDP2 shards one by one, if its config does not name them.

    transformers' list for a model family may name layers that this model does not have. accelerate does not accept
    those, so they are left out.

    Raises:
        RecipeError: FSDP version 1 is configured.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError("fsdp_config: fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml")
    if is_sharded(model):
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # of another type
        plugin.set_state_dict_type(
            "SHARDED_STATE_DICT"
        )  # whole, a checkpoint would be gathered by the first process
        plugin.transformer_cls_names_to_wrap = []  # the layers have classes of FSDP2 now
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted(_layer_classes(model))
