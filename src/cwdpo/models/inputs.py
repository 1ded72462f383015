"""Model inputs from encoded prompts, for scoring and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cwdpo.data.encode.encoder import EncodedPrompt


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter."""
    return next(model.parameters()).device


def unwrapped(model: nn.Module) -> Any:
    """The model without its wrappers (DDP, DeepSpeed, peft)."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def cat_rows(pieces: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the first axis; the other axes are padded with zeros to the largest size."""
    if len({p.shape[1:] for p in pieces}) == 1:
        return torch.cat(list(pieces))
    shape = [max(sizes) for sizes in zip(*(p.shape[1:] for p in pieces), strict=True)]
    out = pieces[0].new_zeros(sum(len(p) for p in pieces), *shape)
    start = 0
    for piece in pieces:
        window = (slice(start, start + len(piece)), *(slice(0, s) for s in piece.shape[1:]))
        out[window] = piece
        start += len(piece)
    return out


def image_inputs(prompts: Sequence[EncodedPrompt], device: torch.device) -> dict[str, Tensor]:
    """Inputs of the vision tower for all rows in order; rows without an image add nothing."""
    loaded = {id(p): p.images for p in prompts}  # in plain scoring, a prompt is in one row per completion
    rows = [loaded[id(p)] for p in prompts]
    names = {name for images in rows for name in images}
    # Each piece on its own: workers' results lie in pinned memory, which is copied while the GPU computes.
    return {
        name: cat_rows([r[name].to(device, non_blocking=r[name].is_pinned()) for r in rows if name in r])
        for name in sorted(names)
    }


def padded(rows: Sequence[Sequence[int]], device: torch.device, width: int = 0) -> Tensor:
    """[rows, max(longest row, ``width``)] token ids of dtype ``long``, padded on the right with zeros."""
    longest = max(width, max(map(len, rows)))
    out = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out.to(device)
