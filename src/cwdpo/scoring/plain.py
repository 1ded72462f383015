"""Plain scoring: one full sequence per completion, right-padded. Tests compare every faster layout with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.families.base import Family
from cwdpo.models.inputs import device_of, padded
from cwdpo.models.shared_attention import model_family
from cwdpo.models.vision_cache import vision_inputs
from cwdpo.objectives.base import TokenStat
from cwdpo.scoring.token_logp import HeadRequest, TokenScores, score_rows


def lay_out(model: nn.Module, batch: PromptBatch) -> tuple[dict[str, Any], HeadRequest]:
    """Model inputs with one full sequence per completion, and the positions that predict completion tokens.

    Returns:
        ``input_ids`` and ``attention_mask`` [N, longest], the family's per-token rows of the same shape
        and image inputs; and the request for M = sum of completion lengths tokens.
    """
    device = device_of(model)
    prompts = [batch.prompts[i] for i in batch.completion_prompt.tolist()]
    rows = [[*p.input_ids, *c.ids] for p, c in zip(prompts, batch.completions, strict=True)]
    inputs: dict[str, Any] = {
        "input_ids": padded(rows, device),
        "attention_mask": padded([[1] * len(r) for r in rows], device),
    }
    longest, family = inputs["input_ids"].shape[1], model_family(model) or Family()
    inputs |= {name: rows.to(device) for name, rows in family.token_rows(prompts, longest).items()}
    inputs |= family.fit(vision_inputs(model, prompts, device), prompts, longest)
    where = [
        (row, len(p.input_ids) - 1 + t, token)
        for row, (p, c) in enumerate(zip(prompts, batch.completions, strict=True))
        for t, token in enumerate(c.ids)
    ]
    rows_, positions, targets = torch.tensor(where, dtype=torch.long).T
    return inputs, HeadRequest(rows_, positions, targets)


def score(
    model: nn.Module,
    batch: PromptBatch,
    *,
    stats: Iterable[str | TokenStat] = (),
    whole: Tensor | None = None,
) -> TokenScores:
    """:func:`cwdpo.scoring.score.score` with plain rows, even if the model is in shared-prefix mode."""
    return score_rows(model, batch, lay_out, stats, whole)
