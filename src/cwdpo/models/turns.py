"""The processes of a run call a sharded model at the same time, as often as the busiest of them.

FSDP2 gathers the weights of a layer from all processes when the layer runs. If one process called the model alone, it
would wait for the others. So during a pass (reference values, sampling, probes) every call is a turn that the processes
agree on: one that has nothing to compute in a turn runs a silent row, whose result is thrown away. A turn has one kind,
because a row with images runs the vision tower and a row without does not; a process whose call is of another kind
makes it in a later turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.errors import DataError, ModelError
from cwdpo.models.families.base import Family
from cwdpo.models.inputs import device_of, image_inputs, unwrapped
from cwdpo.models.sharding import gather_no_more, is_sharded
from cwdpo.models.shared_attention import model_family
from cwdpo.waiting import largest, several

_PIXELS = ("pixel_values", "pixel_values_videos")
_DONE, _TEXT = 0, 1
_PROMPTS: WeakKeyDictionary[nn.Module, Callable[[], Iterable[EncodedPrompt]]] = WeakKeyDictionary()
_FOUND: WeakKeyDictionary[nn.Module, dict[int, EncodedPrompt]] = WeakKeyDictionary()
_ACTIVE: list[nn.Module] = []


def silent_rows_from(model: nn.Module, prompts: Callable[[], Iterable[EncodedPrompt]]) -> None:
    """Say where a process takes the images of a silent row from.

    Args:
        model: the sharded model, as it is called.
        prompts: gives the run's prompts, the same on all processes; read only if a silent row needs an image.
    """
    _PROMPTS[model] = prompts
    _FOUND.pop(model, None)


@contextmanager
def in_turns(model: nn.Module) -> Iterator[None]:
    """Inside, this process may call a sharded model as often as it likes, also never.

    All processes enter and leave together: who is done runs silent rows until all are. Inside, no process may wait for
    another one in any other way. Of a model that is not sharded, nothing happens.

    Args:
        model: as it is called; its mode and gathered parameters are restored.
    """
    if not is_sharded(model) or not several() or model in _ACTIVE:
        yield
        return
    _ACTIVE.append(model)
    try:
        yield
    finally:
        _ACTIVE.remove(model)
        while (kind := largest(_DONE, "a pass over the data")) != _DONE:
            _run_silent_row(model, kind)
        gather_no_more(model)


def take_turn(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Called before each call of the model: returns when it is this call's turn.

    Args:
        model: as it is called.
        inputs: of the call.
    """
    if model not in _ACTIVE:
        return
    own = _kind(inputs)
    while (kind := largest(own, "a pass over the data")) != own:
        _run_silent_row(model, kind)


def _kind(inputs: Mapping[str, Any]) -> int:
    """1 for text alone, 2 with images, 3 with videos, 4 with both: the larger ones go first."""
    return _TEXT + sum(1 << i for i, name in enumerate(_PIXELS) if inputs.get(name) is not None)


@torch.no_grad()
def _run_silent_row(model: nn.Module, kind: int) -> None:
    prompt = EncodedPrompt((0,)) if kind == _TEXT else _pictured(model, kind)
    inner, family = unwrapped(model), model_family(model) or Family()
    device, length = device_of(model), len(prompt.input_ids)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([prompt.input_ids], device=device),
        "attention_mask": torch.ones(1, length, dtype=torch.long, device=device),
        **{name: rows.to(device) for name, rows in family.token_rows([prompt], length).items()},
        **family.fit(image_inputs([prompt], device), [prompt], length),
    }
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = 1
    with unchanged(model):
        model(**inputs, use_cache=False)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards the mode and the positions that the model stores (``rope_deltas``) are restored."""
    was_training = model.training
    mrope: Any = next((m for m in model.modules() if hasattr(m, "rope_deltas")), None)
    stale = None if mrope is None else mrope.rope_deltas
    model.eval()
    try:
        yield
    finally:
        if mrope is not None:
            mrope.rope_deltas = stale
        model.train(was_training)


def _pictured(model: nn.Module, kind: int) -> EncodedPrompt:
    """The first readable prompt of the run whose call is of this kind."""
    found = _FOUND.setdefault(model, {})
    if kind not in found:
        for prompt in _PROMPTS.get(model, tuple)():
            try:
                if prompt.image_digest and _kind(prompt.images) == kind:
                    found[kind] = prompt.loaded()
                    break
            except DataError:  # reported where the row is used
                continue
        else:
            raise ModelError(
                "a sharded model (FSDP2) is called with images or videos by one process, and the recipe's data has no "
                "such row for the others: use DDP (configs/accelerate/ddp.yaml), or add one"
            )
    return found[kind]
