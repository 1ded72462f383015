"""Plain scoring: one full sequence per completion, right-padded. The oracle of every faster path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cwdpo.data.collate import PromptBatch
from cwdpo.data.encode import EncodedPrompt
from cwdpo.scoring.token_logp import HeadRequest, TokenScores, scoring_head, unpack


def cat_rows(pieces: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; other axes are padded with zeros to the longest piece."""
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
    """Vision inputs of rows in order; a row without an image adds nothing."""
    loaded = {id(p): p.images for p in prompts}  # a prompt stands in one row per completion
    rows = [loaded[id(p)] for p in prompts]
    names = {name for images in rows for name in images}
    return {name: cat_rows([r[name] for r in rows if name in r]).to(device) for name in sorted(names)}


def lay_out(batch: PromptBatch, device: torch.device) -> tuple[dict[str, Any], HeadRequest]:
    """Model inputs of one full sequence per completion, and where its completion tokens are predicted.

    Returns:
        ``input_ids`` and ``attention_mask`` [N, longest], the family's per-token rows of the same shape
        (zero on completions) and image inputs; and the request for M = sum of completion lengths tokens.
    """
    prompts = [batch.prompts[i] for i in batch.completion_prompt.tolist()]
    rows = [[*p.input_ids, *c.ids] for p, c in zip(prompts, batch.completions, strict=True)]
    inputs: dict[str, Any] = {
        "input_ids": _padded(rows, device),
        "attention_mask": _padded([[1] * len(r) for r in rows], device),
    }
    for name in sorted({n for p in prompts for n in p.per_token}):
        inputs[name] = _padded([list(p.per_token.get(name, [0] * len(p.input_ids))) for p in prompts], device)
        short = inputs["input_ids"].shape[1] - inputs[name].shape[1]
        inputs[name] = nn.functional.pad(inputs[name], (0, short))
    inputs |= image_inputs(prompts, device)
    where = [
        (row, len(p.input_ids) - 1 + t, token)
        for row, (p, c) in enumerate(zip(prompts, batch.completions, strict=True))
        for t, token in enumerate(c.ids)
    ]
    rows_, positions, targets = torch.tensor(where, dtype=torch.long).T
    return inputs, HeadRequest(rows_, positions, targets)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    out = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out.to(device)


def run(model: nn.Module, inputs: Mapping[str, Any], request: HeadRequest) -> Tensor:
    """Call the model with its head answering ``request``: [M, columns]."""
    with scoring_head(model, request):
        logits = model(**inputs, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def score(
    model: nn.Module,
    batch: PromptBatch,
    *,
    smoothing: bool = False,
    details: bool = False,
    collision: bool = False,
) -> TokenScores:
    """Score every completion of a batch.

    Args:
        model: a causal vision-language model, bare or wrapped.
        batch: B prompts with N completions.
        smoothing: also the mean log-probability over the vocabulary (``sft_smoothed``).
        details: also entropy, top-1 probability and correctness.
        collision: also the log-probability that two draws of a token agree (``wpo``).

    Returns:
        [N, C] per-token scores, C the longest completion, in nats.
    """
    inputs, request = lay_out(batch, device_of(model))
    request = HeadRequest(
        request.rows, request.positions, request.targets, smoothing, details, collision=collision
    )
    stats = run(model, inputs, request)
    return unpack(stats, request, [len(c.ids) for c in batch.completions])


@torch.no_grad()
def distributions(model: nn.Module, batch: PromptBatch) -> Tensor:
    """Log-probabilities over the vocabulary at all M completion tokens, [M, V], completion by completion.

    For small held-out sets only: this is the tensor that :func:`score` avoids.
    """
    inputs, request = lay_out(batch, device_of(model))
    return run(model, inputs, HeadRequest(request.rows, request.positions, request.targets, full=True))


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter."""
    return next(model.parameters()).device
