"""Token scores of a batch, in the row layout that the model is set to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.shared_attention import model_family, shares_prefix
from cwdpo.objectives.base import TokenStat
from cwdpo.scoring import plain, shared_prefix
from cwdpo.scoring.token_logp import HeadRequest, TokenScores, score_rows


def score(
    model: nn.Module,
    batch: PromptBatch,
    *,
    stats: Iterable[str | TokenStat] = (),
    whole: Tensor | None = None,
) -> TokenScores:
    """Score every completion of a batch, with shared-prefix rows if the model is in shared-prefix mode.

    Args:
        model: a causal vision-language model, bare or wrapped.
        batch: B prompts with N completions.
        stats: statistics to compute for every token: names of :data:`cwdpo.scoring.token_stats.TOKEN_STATS`, or
            functions with the same signature.
        whole: [N] True for the completions whose log-probabilities over the whole vocabulary are kept. Use it for few
            completions and without gradient: these are the large tensors that scoring otherwise avoids.

    Returns:
        Scores [N, C] per token, C the length of the longest completion, in nats.

    Raises:
        ModelError: a prompt that this model family would score wrongly without an error.
    """
    return score_rows(model, batch, _lay_out, stats, whole)


def row_tokens(batch: PromptBatch, *, shared: bool) -> tuple[int, int]:
    """``(tokens, tokens with padding)`` that the language model processes for a batch."""
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
