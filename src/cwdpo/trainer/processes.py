"""What the processes of a run do together: agree on a step before it begins, put shards together after training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.data.encode.encoder import EncodedExample, EncodedPrompt
from cwdpo.errors import DataError, ModelError, RecipeError


def together(
    accelerator: Accelerator,
    batches: Sequence[PromptBatch],
    *,
    sharded: bool,
    examples: Sequence[EncodedExample],
) -> list[PromptBatch]:
    """The micro-batches of a step as all processes can run them; all processes call this together.

    Their images are in memory. A process without a row of its own runs a silent one.

    Args:
        sharded: parameters are gathered from all processes whenever a module is called (FSDP2, ZeRO-3). A
            process without an image would leave the vision tower out while the others wait for its share:
            there it runs a silent row with an image.
        examples: the data, for silent rows.

    Raises:
        DataError: on every process, when the images of any cannot be read.
    """
    error, loaded = "", list(batches)
    try:
        loaded = [batch.loaded() for batch in batches]
    except DataError as problem:
        error = str(problem)
    pictured = [not error and any(p.images for p in batch.prompts) for batch in loaded]
    flags = torch.tensor([float(bool(error)), *map(float, pictured)], device=accelerator.device)
    failed, *anywhere = accelerator.reduce(flags, "sum").tolist()
    if failed:
        raise DataError("; ".join(dict.fromkeys(text for text in gather_object([error]) if text)))
    return [
        # Without an image where nobody has one: the vision tower stays without a gradient, as in one process.
        batch.with_silent_row(_silent_prompt(examples, bool(others)))
        if not batch.prompts or (sharded and others and not own)
        else batch
        for batch, own, others in zip(loaded, pictured, anywhere, strict=True)
    ]


def _silent_prompt(examples: Sequence[EncodedExample], pictured: bool) -> EncodedPrompt:
    """A prompt for a silent row. Without an image it is a response's tokens, which any model can read."""
    if not pictured:
        return EncodedPrompt(examples[0].chosen.ids)
    for example in examples:
        with contextlib.suppress(DataError):  # what cannot be read is reported where it is trained on
            if example.prompt.images:
                return example.prompt.loaded()
    raise AssertionError("another process has an image of the same data")


class Unsharded:
    """The model as it was before its parameters were sharded: FSDP2 and ZeRO-3 shard in place, with no way back.

    Args:
        model: the whole model; of its parameters nothing is copied here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = {
            name: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        }
        self._skeleton = copy.deepcopy(model, {id(p): self._places[n] for n, p in model.named_parameters()})

    def filled(self, sharded: nn.Module) -> nn.Module:
        """The whole model with the weights of ``sharded``; all processes call this together.

        Raises:
            ModelError: a parameter could not be put together.
        """
        whole: dict[int, nn.Parameter] = {}
        for name, parameter in sharded.named_parameters():
            place = self._places[name.replace("_checkpoint_wrapped_module.", "")]
            whole[id(place)] = _whole(parameter)
            if whole[id(place)].shape != place.shape:
                raise ModelError(f"{name}: has {tuple(parameter.shape)} of {tuple(place.shape)} values here")
        for module in self._skeleton.modules():
            for name, place in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                setattr(module, name, whole[id(place)])
        return self._skeleton


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    if hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter]):
            value: Tensor = parameter.detach().clone()
    else:
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def check_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell FSDP2 which layers to shard one by one, where its config does not.

    A family's own list also names layers of its kin, which this model need not have and accelerate refuses.

    Raises:
        RecipeError: FSDP of version 1.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError("fsdp_config: fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml")
    if plugin.transformer_cls_names_to_wrap is None:
        known = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(
            known & set(getattr(model, "_no_split_modules", None) or ())
        )
