"""Loads a policy for FSDP2 so that no process ever holds more of the weights than its part and one layer.

transformers reads a checkpoint in parts (``distributed_config``): each process reads its rows of every tensor. But it
shards the bare model, and peft cannot add adapters to that. So its result is only a source of weights: a model without
weights gets its frozen parts and its adapter, accelerate shards it as it does any model, and then the parts are put in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cwdpo.errors import ModelError
from cwdpo.models.checkpoint import adapter_base, check_folder, quiet
from cwdpo.models.load import EMBEDDED, Policy, load_processor, read_model, tunable
from cwdpo.models.own_code import import_code
from cwdpo.models.sharding import check_sharding, from_part, in_parts, local_part
from cwdpo.models.write import use_hub_names

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cwdpo.models.settings import ModelSettings


def why_not_sharded(settings: ModelSettings) -> str | None:
    """Why every process must load the whole model before FSDP2 shards it; ``None`` if it can be loaded in parts."""
    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    lora = settings.lora
    found = {
        "model.quantization": settings.quantization is not None,
        "an adapter in model.path": (Path(source) / "adapter_config.json").is_file(),
    }
    if settings.tune == "lora":
        found |= {
            "model.lora.use_dora": lora.use_dora,
            "model.lora.init_lora_weights": lora.init_lora_weights != "default",
            "model.lora.modules_to_save": bool(lora.modules_to_save),
        }
    return next((name for name, on in found.items() if on), None)


def load_sharded(settings: ModelSettings, accelerator: Accelerator) -> Policy:
    """Load model and processor ready to train, divided over the processes. All processes call this together.

    Adapters start with the same weights as those of a model that is loaded whole.

    Args:
        settings: the recipe's section ``model``; :func:`why_not_sharded` has no objection.
        accelerator: with accelerate's settings of FSDP2.

    Raises:
        ModelError: see :func:`cwdpo.models.load.load_policy`.
        RecipeError: FSDP version 1 is configured.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from cwdpo.models.shared_attention import use_scoring

    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    import_code(settings)
    check_folder(source, revision=settings.revision)
    adapter_base(source, settings.revision)  # refuses an adapter on the hub
    processor = load_processor(source, settings)
    read = read_model(source, settings, **in_parts())
    bare = _without_weights(read, settings)
    names = {id(p): name for name, p in bare.named_parameters()}
    model = tunable(bare, settings)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"model.freeze {list(settings.freeze)} leaves nothing to train")
    placed = {name: names[id(p)] for name, p in model.named_parameters() if id(p) in names}

    def shapeless(name: str, old: nn.Parameter) -> nn.Parameter:
        if name not in placed:
            return old
        return nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=old.requires_grad)

    _replace(model, shapeless)
    use_scoring(model, settings.scoring)
    check_sharding(accelerator, model)
    model = fsdp2_prepare_model(accelerator, model)
    parts = dict(read.named_parameters())

    def filled(name: str, old: nn.Parameter) -> nn.Parameter:
        if name not in placed:
            return old
        part = local_part(parts[placed[name]].detach()).to(old.dtype)
        return nn.Parameter(from_part(part, old), requires_grad=old.requires_grad)

    _replace(model, filled)
    return Policy(model, processor, source)


def _without_weights(read: Any, settings: ModelSettings) -> nn.Module:
    """A model like ``read`` on the CPU: parameters of the right shape that take no memory, and its buffers.

    Each parameter is one number, seen as if it were many. Unlike on the meta device, peft makes adapters with weights.
    """
    from transformers import AutoModelForImageTextToText

    config = read.config
    del config.distributed_config
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(
            config, attn_implementation=settings.attention, trust_remote_code=settings.trust_remote_code
        )
    values, buffers = dict(read.named_parameters()), dict(read.named_buffers())

    def of_one_number(name: str, parameter: nn.Parameter) -> nn.Parameter:
        like = values[name]
        one = torch.zeros((), dtype=like.dtype).expand(parameter.shape)
        return nn.Parameter(one, requires_grad=like.is_floating_point())

    _replace(model, of_one_number)
    for prefix, module in model.named_modules():
        for name, _ in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffers[f"{prefix}.{name}".removeprefix(".")]
    model.generation_config = read.generation_config
    model._weight_conversions = read._weight_conversions
    use_hub_names(model)  # transformers finds them by the class, of which FSDP2 makes another one
    return model.eval()


def _replace(model: nn.Module, new: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter by what ``new`` makes of its name and itself; tied parameters stay tied."""
    made: dict[
        int, tuple[nn.Parameter, nn.Parameter]
    ] = {}  # the old one is kept, so that no other gets its id
    for prefix, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in made:
                made[id(old)] = old, new(f"{prefix}.{name}".removeprefix("."), old)
            setattr(module, name, made[id(old)][1])
