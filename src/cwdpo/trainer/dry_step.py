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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.data.encode.encoder import EncodedPrompt
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
        spread: number of GPUs that gradients are spread over as they are made (FSDP2).
    """

    bf16: bool = False
    checkpointing: bool = False
    accumulates: bool = False
    stats: Iterable[str | TokenStat] = ()
    spread: int = 1


class DryRun:
    """Runs micro-batches on a hollow model.

    Features of a frozen vision side are computed once for each shape of images: what they take is remembered, and they
    stay in the model's cache.

    Args:
        model: the hollow model. Its gradients are replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._vision: dict[tuple[str, bool], StepCost] = {}

    def step(self, batch: PromptBatch, how: HowToStep) -> StepCost:
        """The cost of one forward and backward pass over a micro-batch; its images are loaded for their shapes."""
        model, batch = self.model, replace(batch, prompts=tuple(map(_named_by_shape, batch.prompts)))
        _set_checkpointing(model, how.checkpointing)
        model.train()
        autocast = torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=how.bf16)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if how.accumulates else None
        tally = self._tally(how.spread)
        tally.add_gradients(trained)
        handles = [p.register_post_accumulate_grad_hook(tally.note_gradient) for p in trained]
        try:
            with autocast:
                vision = [self._features(prompt, how.bf16) for prompt in batch.prompts if prompt.image_digest]
                with tally.watching(model):
                    tokens = score(model, batch, stats=how.stats)
                    loss = tokens.logp.sum() + sum(value.sum() for value in tokens.stats.values())
                    del tokens
                    forward, tally.place = tally.flops, [BACKWARD]
                    loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.grad = None
        # The features are computed before the step, when nothing else is in memory.
        peak, parts = max(
            ((tally.peak, tally.at_peak), *((v.peak, v.parts) for v in vision)), key=lambda p: p[0]
        )
        return StepCost(
            peak,
            {part: size for part, size in parts.items() if size},
            forward,
            tally.flops - forward,
            sum(v.vision for v in vision),
            sum(v.cached for v in vision),
        )

    def _features(self, prompt: EncodedPrompt, bf16: bool) -> StepCost:
        """What the features of a prompt's images take; nothing if they are computed in the step."""
        key = prompt.image_digest, bf16
        if key not in self._vision:
            tally = self._tally()
            with tally.watching(self.model):
                features = vision_inputs(self.model, [prompt], device_of(self.model)).get(
                    "mm_encoder_outputs"
                )
                size = tally.forget(features)
            kept = features is not None
            self._vision[key] = (
                StepCost(tally.peak, tally.at_peak, vision=tally.flops, cached=size) if kept else StepCost(0)
            )
        return self._vision[key]

    def _tally(self, spread: int = 1) -> Tally:
        tally = Tally(unwrapped(self.model).get_output_embeddings().out_features, spread)
        tally.ignore((*self.model.parameters(), *self.model.buffers()))
        return tally


def _named_by_shape(prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt with its images in memory, and a digest that is equal for images of equal shapes."""
    if not prompt.image_digest:
        return prompt
    prompt = prompt.loaded()
    shapes = [
        (name, tuple(t.shape), None if t.is_floating_point() else t.tolist())
        for name, t in sorted(prompt.images.items())
    ]
    return replace(prompt, image_digest=repr(shapes))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_DEVICE = torch.ops.prim.device.default
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


class Tally(KnownIndices):
    """Counts the bytes of all tensors that are made while it is active, until they are freed, and operations.

    torch's ``FlopCounterMode`` is not used: its hooks keep the activations of checkpointed layers in memory. A tensor's
    memory is that of its storage, so views add nothing. Works for fake and for real tensors.

    Args:
        vocabulary: number of logits; tensors whose last size it is belong to the output head.
        spread: a gradient of a parameter counts as this part of its bytes.
    """

    def __init__(self, vocabulary: int = 0, spread: int = 1) -> None:
        super().__init__()
        self.vocabulary, self.spread = vocabulary, spread
        self.peak, self.now, self.flops = 0, 0, 0
        self.parts: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.place = [INPUTS]
        self._known: dict[int, tuple[Any, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count its operations, and the memory of what it made."""
        kwargs = kwargs or {}
        if func is _DEVICE:  # what ``tensor.device`` of a fake tensor asks
            return func(*args, **kwargs)
        made = super().__torch_dispatch__(func, types, args, kwargs)
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

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Count the gradients that parameters have already."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._add_gradient(parameter.grad)

    def note_gradient(self, parameter: Tensor) -> None:
        """The memory of a parameter's gradient stays until the update."""
        if parameter.grad is not None:
            self.forget([parameter.grad])
            self._add_gradient(parameter.grad)

    def _add_gradient(self, gradient: Tensor) -> None:
        self.add(gradient, GRADIENTS, gradient.untyped_storage().nbytes() // self.spread)

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
