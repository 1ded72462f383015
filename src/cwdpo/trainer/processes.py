"""Work that the processes of a run do together: agree on each step before it starts, and join a sharded model."""

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
from cwdpo.models.quantization import quantization_of
from cwdpo.models.sharding import whole


def together(
    accelerator: Accelerator,
    batches: Sequence[PromptBatch],
    *,
    sharded: bool,
    pictured: bool = False,
    examples: Sequence[EncodedExample],
) -> list[PromptBatch]:
    """Change the micro-batches of a step so that all processes can run it; all processes call this together.

    Loads the images of the micro-batches. A process that has no example for a micro-batch runs a silent row: a row that
    adds nothing to the loss.

    Args:
        accelerator: of the trainer.
        batches: this process's micro-batches of the step.
        sharded: whether parameters are gathered from all processes when a module is called (FSDP2, ZeRO-3). A process
            without an image would then skip the vision tower while the others wait for its part of the parameters, so
            it runs a silent row with an image.
        pictured: whether it does so too when no process has an image, see :func:`applies_old_gradients`.
        examples: the training data, from which silent rows take their prompt.

    Raises:
        DataError: on every process, if an image cannot be read on any process.
    """
    error, loaded = "", list(batches)
    try:
        loaded = [batch.loaded() for batch in batches]
    except DataError as problem:
        error = str(problem)
    own_images = [not error and any(p.images for p in batch.prompts) for batch in loaded]
    flags = torch.tensor([float(bool(error)), *map(float, own_images)], device=accelerator.device)
    failed, *anywhere = accelerator.reduce(flags, "sum").tolist()
    if failed:
        raise DataError("; ".join(dict.fromkeys(text for text in gather_object([error]) if text)))
    return [
        # If no process has an image, the silent row has none either: the vision tower then gets no gradient, as it
        # would with one process.
        batch.with_silent_row(_silent_prompt(examples, bool(others or pictured)))
        if not batch.prompts or (sharded and (others or pictured) and not own)
        else batch
        for batch, own, others in zip(loaded, own_images, anywhere, strict=True)
    ]


def applies_old_gradients(accelerator: Accelerator) -> bool:
    """Whether a parameter without a gradient in a step is updated with that of an earlier step: ZeRO-3 does so.

    It keeps a gradient until the parameter gets another one (DeepSpeed 0.19).
    """
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _silent_prompt(examples: Sequence[EncodedExample], pictured: bool) -> EncodedPrompt:
    """A prompt for a silent row. Without an image it consists of a response's tokens, which any model can process."""
    if not pictured:
        return EncodedPrompt(examples[0].chosen.ids)
    for example in examples:
        with contextlib.suppress(DataError):  # an unreadable image is reported when its example is trained on
            if example.prompt.images:
                return example.prompt.loaded()
    raise AssertionError("no example has a readable image, but another process has loaded one")


class Unsharded:
    """Restores a whole model from a sharded one: FSDP2 and ZeRO-3 shard in place and cannot be undone.

    Args:
        model: the model before it is sharded; its structure is copied, its parameters are not.

    Raises:
        RecipeError: its weights are quantized.
    """

    def __init__(self, model: nn.Module) -> None:
        if quantization_of(model) is not None:
            raise RecipeError(
                "model.quantization: quantized weights are not sharded: use DDP (configs/accelerate/), where every "
                "process holds the quantized model, or leave it out"
            )
        self._places = {
            name: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        }
        self._skeleton = copy.deepcopy(model, {id(p): self._places[n] for n, p in model.named_parameters()})
        # Collected now: once the skeleton is filled, its parameters are no longer those of _places.
        self._uses = [
            (module, name, id(place))
            for module in self._skeleton.modules()
            for name, place in module.named_parameters(recurse=False, remove_duplicate=False)
        ]

    def filled(self, sharded: nn.Module) -> nn.Module:
        """The whole model with the weights of ``sharded``; all processes call this together.

        Raises:
            ModelError: a parameter could not be joined from its shards.
        """
        joined: dict[int, nn.Parameter] = {}
        for name, parameter in sharded.named_parameters():
            place = self._places[name.replace("_checkpoint_wrapped_module.", "")]
            joined[id(place)] = _whole(parameter)
            if joined[id(place)].shape != place.shape:
                raise ModelError(f"{name}: has {tuple(parameter.shape)} of {tuple(place.shape)} values here")
        for module, name, place_id in self._uses:
            setattr(module, name, joined[place_id])
        return self._skeleton


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            value: Tensor = parameter.detach().clone()
    else:
        value = whole(parameter.detach())
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
