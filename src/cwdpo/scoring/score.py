"""Token scores of a batch, by the path that the model is switched to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.shared_attention import model_family, shares_prefix
from cwdpo.scoring import plain, shared_prefix
from cwdpo.scoring.token_logp import HeadRequest, TokenScores, run, unpack


def score(
    model: nn.Module,
    batch: PromptBatch,
    *,
    smoothing: bool = False,
    details: bool = False,
    collision: bool = False,
    whole: Tensor | None = None,
) -> TokenScores:
    """Score every completion of a batch, in shared-prefix rows where the model is switched to them.

    Args:
        model: a causal vision-language model, bare or wrapped.
        batch: B prompts with N completions.
        smoothing: also the mean log-probability over the vocabulary (``sft_smoothed``).
        details: also entropy, top-1 probability and correctness.
        collision: also the log-probability that two draws of a token agree (``wpo``).
        whole: [N] True for completions whose log-probabilities over the vocabulary are kept; only without gradient
            and for few, since they are the tensor that scoring avoids.

    Returns:
        [N, C] per-token scores, C the longest completion, in nats.

    Raises:
        ModelError: a prompt that this family would score silently wrong.
    """
    inputs, request = _lay_out(model, batch)
    lengths = [len(c.ids) for c in batch.completions]
    tokens = None if whole is None else whole.repeat_interleave(torch.tensor(lengths))
    request = replace(request, smoothing=smoothing, details=details, collision=collision, whole=tokens)
    return unpack(run(model, inputs, request), request, lengths)


def row_tokens(batch: PromptBatch, *, shared: bool) -> tuple[int, int]:
    """(tokens, tokens with padding) that the model's text tower runs for a batch."""
    completions = [len(c.ids) for c in batch.completions]
    prompts = [len(p.input_ids) for p in batch.prompts]
    own = batch.completion_prompt.tolist()
    if not shared:
        rows = [prompts[p] + n for p, n in zip(own, completions, strict=True)]
        return sum(rows), len(rows) * max(rows, default=0)
    behind = [0] * len(prompts)
    for prompt, n in zip(own, completions, strict=True):
        behind[prompt] += n
    used = sum(prompts) + sum(behind)
    return used, len(prompts) * (max(prompts, default=0) + max(behind, default=0))


def _lay_out(model: nn.Module, batch: PromptBatch) -> tuple[dict[str, Any], HeadRequest]:
    family = model_family(model)
    if family is not None:
        family.check(batch.prompts)
    return shared_prefix.lay_out(model, batch) if shares_prefix(model) else plain.lay_out(model, batch)
