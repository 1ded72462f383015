"""One micro-batch of training on a hollow model: memory and floating-point operations, without computing anything.

The scoring code of a real step runs on fake tensors (:mod:`cwdpo.models.hollow`). :class:`Tally` counts the memory of
every tensor from its creation until it is freed, and the operations by torch's formulas.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.hollow import KnownIndices
from cwdpo.models.inputs import device_of, unwrapped
from cwdpo.models.parts import PARTS
from cwdpo.models.vision_cache import vision_inputs
from cwdpo.objectives.base import TokenStat
from cwdpo.scoring.score import score

GRADIENTS, HEAD, IMAGES, TEXT, BACKWARD, INPUTS = (
    "gradients", "output head", "images", "text", "backward", "inputs",
)  # fmt: skip
OF_THE_BATCH = (HEAD, IMAGES, TEXT, BACKWARD, INPUTS)
"""Parts whose size depends on the micro-batch."""


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch takes.

    Attributes:
        peak: most bytes in use at a time that the step made itself: without weights and optimizer state.
        parts: the bytes of the peak by part: gradients; tensors with a number for every token of the vocabulary
            (``output head``); activations of the vision side (``images``) and of the language model (``text``); what
            the backward pass itself makes; inputs.
        forward: floating-point operations of the forward pass of the language model, and of the vision side if that
            is trained.
        backward: those of the backward pass, with the layers that checkpointing computes again.
        vision: those of a frozen vision side, which are saved where its features are cached.
        cached: bytes of the batch's image features in that cache.
    """

    peak: int
    parts: Mapping[str, int] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0
    vision: int = 0
    cached: int = 0


@dataclass(frozen=True)
class HowToStep:
    """How the micro-batch is computed.

    Attributes:
        bf16: under bfloat16 autocast.
        checkpointing: with activation checkpointing.
        accumulates: whether gradients of an earlier micro-batch are in memory.
        stats: the objective's ``token_stats``.
    """

    bf16: bool = False
    checkpointing: bool = False
    accumulates: bool = False
    stats: Iterable[str | TokenStat] = ()


def dry_step(model: nn.Module, batch: PromptBatch, how: HowToStep) -> StepCost:
    """The cost of one forward and backward pass over a micro-batch.

    Args:
        model: a hollow model; its gradients are replaced.
        batch: the micro-batch; its images are loaded for their shapes.
        how: see :class:`HowToStep`.
    """
    _set_checkpointing(model, how.checkpointing)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if how.accumulates else None
    tally = Tally(vocabulary=unwrapped(model).get_output_embeddings().out_features)
    tally.ignore((*model.parameters(), *model.buffers()))
    for parameter in trained:
        if parameter.grad is not None:
            tally.add(parameter.grad, GRADIENTS)
    handles = [p.register_post_accumulate_grad_hook(tally.note_gradient) for p in trained]
    autocast = torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=how.bf16)
    try:
        with tally.watching(model), KnownIndices(), autocast:
            # Frozen features are computed now and lie in the cache, outside the device, when the step asks for them.
            size = _cache_features(model, batch, tally)
            vision = tally.flops
            tokens = score(model, batch, stats=how.stats)
            loss = tokens.logp.sum() + sum(value.sum() for value in tokens.stats.values())
            del tokens
            forward, tally.place = tally.flops - vision, [BACKWARD]
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    backward = tally.flops - forward - vision
    return StepCost(
        tally.peak, {k: v for k, v in tally.at_peak.items() if v}, forward, backward, vision, size
    )


def _cache_features(model: nn.Module, batch: PromptBatch, tally: Tally) -> int:
    """Compute the features of a frozen vision side; returns the bytes that they take in the cache."""
    features = vision_inputs(model, batch.prompts, device_of(model)).get("mm_encoder_outputs")
    return tally.forget(features)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's formulas, and attention on CPUs, which torch has none for, counted like attention on GPUs: the whole square,
also where it is causal."""


def _set_checkpointing(model: Any, on: bool) -> None:
    if on:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()


class Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, until they are freed, and operations.

    torch's ``FlopCounterMode`` is not used: its hooks keep the activations of checkpointed layers in memory. A tensor's
    memory is that of its storage, so views add nothing. Works for fake and for real tensors.

    Args:
        vocabulary: number of logits; tensors whose last size it is belong to the output head.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.peak, self.now, self.flops = 0, 0, 0
        self.parts: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.place = [INPUTS]
        self._known: dict[int, tuple[Any, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count its operations, and the memory of what it made."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                wide = self.vocabulary and tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
                self.add(tensor, HEAD if wide else self.place[-1])
        return made

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the memory of these tensors, which exist already."""
        for tensor in tensors:
            self.add(tensor, "", size=0)

    def add(self, tensor: Tensor, part: str, size: int | None = None) -> None:
        """Count a tensor's memory under a part, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._known[key] = weakref.ref(storage, partial(self._freed, key)), size, part
        self._change(part, size)

    def note_gradient(self, parameter: Tensor) -> None:
        """The memory of a parameter's gradient stays until the update."""
        if parameter.grad is not None:
            self.forget([parameter.grad])
            self.add(parameter.grad, GRADIENTS)

    def forget(self, tensors: Any) -> int:
        """Count the memory of these tensors no more; returns its bytes."""
        total = 0
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            found = self._known.pop(tensor.untyped_storage()._cdata, None)
            if found is not None:
                self._change(found[2], -found[1])
                total += found[1]
        return total

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count, and note whether the vision side or the language model of ``model`` makes a tensor."""
        vision = re.compile("|".join((PARTS["vision"], PARTS["projector"])))
        handles = []
        for name, module in model.named_modules():
            part = IMAGES if vision.search(name) else TEXT if re.search(PARTS["text"], name) else ""
            if part:
                handles.append(module.register_forward_pre_hook(partial(self._enter, part)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def _enter(self, part: str, *_: Any) -> None:
        self.place.append(part)

    def _leave(self, *_: Any) -> None:
        self.place.pop()

    def _freed(self, key: int, _: Any) -> None:
        found = self._known.pop(key, None)
        if found is not None:
            self._change(found[2], -found[1])

    def _change(self, part: str, size: int) -> None:
        self.now += size
        self.parts[part] += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, self.parts.copy()
