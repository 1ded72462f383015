"""Image features of a frozen vision tower, computed once per picture and kept in memory for the run.

They are computed prompt by prompt, so that they depend neither on the batch nor on what was kept before: a resumed
run finds the same values to the last bit.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class _Kept:
    features: dict[str, Any]  # fields of the tower's output
    rest: dict[str, Tensor]  # what the model takes besides: grids, sizes


@dataclass
class _Cache:
    free_bytes: float
    kept: dict[tuple[str, bool], _Kept] = field(default_factory=dict)


_CACHES: WeakKeyDictionary[nn.Module, _Cache] = WeakKeyDictionary()


def keep_vision_features(model: nn.Module, gigabytes: float) -> bool:
    """Keep image features of ``model`` from now on, where its vision side is frozen; whether they are kept.

    Args:
        model: bare or wrapped.
        gigabytes: most memory (of the host) for them; what does not fit is computed at every use. 0 keeps none.
    """
    inner = unwrapped(model)
    _CACHES.pop(inner, None)
    text = re.compile(PARTS["text"])
    trained = [n for n, p in inner.named_parameters() if p.requires_grad and not text.search(n)]
    takes = "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
    if not gigabytes or not takes or not hasattr(inner, "get_image_features"):
        return False
    if trained:
        logger.info("image features are computed anew at every step: %s is trained", trained[0])
        return False
    _CACHES[inner] = _Cache(gigabytes * 2**30)
    return True


def forget_vision_features(model: nn.Module) -> None:
    """Compute image features within the model again (parameters that are sharded cannot be called from outside)."""
    _CACHES.pop(unwrapped(model), None)


def vision_inputs(model: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device) -> dict[str, Any]:
    """Vision inputs of rows in order: pixels, or features that were computed before."""
    inner = unwrapped(model)
    cache = _CACHES.get(inner)
    if cache is None or not any(p.image_digest for p in prompts):
        return dict(image_inputs(prompts, device))
    pictured = {id(p): p for p in prompts if p.image_digest}  # a prompt stands in one row per completion
    found = {key: _features(inner, cache, p, device) for key, p in pictured.items()}
    rows = [found[id(p)] for p in prompts if p.image_digest]
    inputs: dict[str, Any] = {
        name: cat_rows([r.rest[name] for r in rows if name in r.rest]).to(device)
        for name in sorted({n for r in rows for n in r.rest})
    }
    joined = {name: _joined([r.features[name] for r in rows]) for name in rows[0].features}
    return {**inputs, "mm_encoder_outputs": {"image": _output(tree_map(lambda t: t.to(device), joined))}}


def _features(inner: Any, cache: _Cache, prompt: EncodedPrompt, device: torch.device) -> _Kept:
    key = prompt.image_digest, torch.is_autocast_enabled(device.type)
    if key in cache.kept:
        return cache.kept[key]
    images = image_inputs([prompt], device)
    # The outer model hands on what it does not name itself (Pixtral's image_sizes).
    owners: list[Any] = [
        one for one in (inner, getattr(inner, "model", None)) if hasattr(one, "get_image_features")
    ]
    known = {name for one in owners for name in inspect.signature(one.get_image_features).parameters}
    with torch.no_grad():
        output = inner.get_image_features(**{n: v for n, v in images.items() if n in known}, return_dict=True)
    features = {
        name: tree_map(
            lambda t: t.detach().to("cpu", copy=True), value
        )  # a copy: slices hold their whole alive
        for name in ("pooler_output", "deepstack_features")
        if (value := getattr(output, name, None)) is not None
    }
    kept = _Kept(features, {n: v.cpu() for n, v in images.items() if not n.startswith("pixel_")})
    size = sum(t.numel() * t.element_size() for t in tree_leaves(features))
    if size <= cache.free_bytes:
        cache.free_bytes -= size
        cache.kept[key] = kept
    return kept


def _joined(values: Sequence[Any]) -> Any:
    """Features of several prompts as the tower gives them for all: by picture, or by layer and then by picture."""
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
