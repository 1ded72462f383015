"""Cache of image and video features: with a frozen vision tower they are computed once and kept in memory.

They are computed prompt by prompt, so they depend neither on the batch nor on the cache: a resumed run computes the
same values to the last bit.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.models.inputs import cat_rows, image_inputs, unwrapped
from cwdpo.models.parts import PARTS

logger = logging.getLogger("cwdpo")


_MEDIA = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The inputs of the vision tower by the name of its outputs. Some families give the frames of videos as images."""


@dataclass(frozen=True)
class _Kept:
    features: dict[str, dict[str, Any]]  # fields of the tower's output, for images and for videos
    rest: dict[str, Tensor]  # other inputs of the model: grids, sizes


@dataclass
class _Cache:
    bytes: float
    free_bytes: float
    kept: dict[tuple[str, bool], _Kept] = field(default_factory=dict)


_CACHES: WeakKeyDictionary[nn.Module, _Cache] = WeakKeyDictionary()


def keep_vision_features(model: nn.Module, gigabytes: float) -> bool:
    """Cache the image features of ``model`` from now on, if its vision tower and projector are frozen.

    Args:
        model: bare or wrapped.
        gigabytes: host memory for the features, in GiB; those that do not fit are computed at every use. 0: no cache.

    Returns:
        Whether features are cached.
    """
    inner = unwrapped(model)
    _CACHES.pop(inner, None)
    text = re.compile(PARTS["text"])
    trained = [n for n, p in inner.named_parameters() if p.requires_grad and not text.search(n)]
    takes = "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
    if not gigabytes or not takes or not hasattr(inner, "get_image_features"):
        return False
    if trained:
        logger.info("image features are computed at every step, not cached: %s is trained", trained[0])
        return False
    _CACHES[inner] = _Cache(gigabytes * 2**30, gigabytes * 2**30)
    return True


def share_vision_features(model: nn.Module, shared: dict[str, Any]) -> None:
    """Let a model use, and add to, the features of other models with the same vision tower and projector.

    Nothing happens if the model caches no features. Of models with different towers, the last one's features are kept.

    Args:
        model: bare or wrapped; its vision tower and projector are frozen.
        shared: the same mapping for all models; its content is of this module only.
    """
    inner: Any = unwrapped(model)
    if inner not in _CACHES:
        return
    digest = hashlib.blake2b(digest_size=16)
    config = inner.config.to_dict()
    digest.update(repr(sorted((k, v) for k, v in config.items() if k != "_name_or_path")).encode())
    text = re.compile(PARTS["text"])
    for name, value in inner.state_dict().items():
        if not text.search(name):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device.type}".encode())
            digest.update(raw)
    key = digest.hexdigest()
    if key not in shared:
        shared.clear()
        shared[key] = _CACHES[inner]
    _CACHES[inner] = shared[key]


def drop_vision_features(model: nn.Module) -> None:
    """Empty the cache: other images are used from now on."""
    if (cache := _CACHES.get(unwrapped(model))) is not None:
        cache.kept.clear()
        cache.free_bytes = cache.bytes


def forget_vision_features(model: nn.Module) -> None:
    """Stop caching: the model computes image features itself again (sharded modules cannot be called from outside)."""
    _CACHES.pop(unwrapped(model), None)


def needs_images(model: nn.Module, prompt: EncodedPrompt) -> bool:
    """Whether scoring a prompt will read its images; not if their features are kept."""
    cache = _CACHES.get(unwrapped(model))
    return cache is None or not any((prompt.image_digest, half) in cache.kept for half in (False, True))


def vision_inputs(model: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device) -> dict[str, Any]:
    """Vision inputs of all rows in order: pixels, or cached image features."""
    inner = unwrapped(model)
    cache = _CACHES.get(inner)
    if cache is None or not any(p.image_digest for p in prompts):
        return dict(image_inputs(prompts, device))
    with_image = {id(p): p for p in prompts if p.image_digest}  # in plain scoring, one row per completion
    found = {key: _features(inner, cache, p, device) for key, p in with_image.items()}
    rows = [found[id(p)] for p in prompts if p.image_digest]
    inputs: dict[str, Any] = {
        name: cat_rows([r.rest[name] for r in rows if name in r.rest]).to(device)
        for name in sorted({n for r in rows for n in r.rest})
    }
    outputs = {}
    for medium in _MEDIA:
        own = [r.features[medium] for r in rows if medium in r.features]
        if own:
            joined = {name: _joined([features[name] for features in own]) for name in own[0]}
            outputs[medium] = _output(tree_map(lambda t: t.to(device), joined))
    return {**inputs, "mm_encoder_outputs": outputs}


def _features(inner: Any, cache: _Cache, prompt: EncodedPrompt, device: torch.device) -> _Kept:
    key = prompt.image_digest, torch.is_autocast_enabled(device.type)
    if key in cache.kept:
        return cache.kept[key]
    images = image_inputs([prompt], device)
    features = {
        medium: _computed(inner, f"get_{medium}_features", images)
        for medium, pixels in _MEDIA.items()
        if pixels in images
    }
    kept = _Kept(features, {n: v.cpu() for n, v in images.items() if not n.startswith("pixel_")})
    size = sum(t.numel() * t.element_size() for t in tree_leaves(features))
    if size <= cache.free_bytes:
        cache.free_bytes -= size
        cache.kept[key] = kept
    return kept


def _computed(inner: Any, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model's ``get_image_features`` or ``get_video_features`` gives, in memory of the host."""
    # The outer model hands on what it does not name itself (Pixtral's image_sizes).
    owners: list[Any] = [one for one in (inner, getattr(inner, "model", None)) if hasattr(one, method)]
    known = {name for one in owners for name in inspect.signature(getattr(one, method)).parameters}
    with torch.no_grad():
        output = getattr(owners[0], method)(
            **{n: v for n, v in inputs.items() if n in known}, return_dict=True
        )
    return {
        name: tree_map(
            lambda t: t.detach().to("cpu", copy=True), value
        )  # a copy: a slice would keep the full tensor in memory
        for name in ("pooler_output", "deepstack_features")
        if (value := getattr(output, name, None)) is not None
    }


def _joined(values: Sequence[Any]) -> Any:
    """Features of several prompts in the format of the vision tower: by image, or by layer and then by image."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first[0], Tensor):
        return [t for value in values for t in value]
    return [_joined(layers) for layers in zip(*values, strict=True)]


def _output(fields: Mapping[str, Any]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    if "deepstack_features" in fields:
        return BaseModelOutputWithDeepstackFeatures(**fields)
    return BaseModelOutputWithPooling(**fields)
