"""Splits batches for families whose rows depend on the other rows of the batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.inputs import unwrapped
from cwdpo.models.shared_attention import model_family


def parts_of(model: nn.Module, batch: PromptBatch) -> list[tuple[Tensor, PromptBatch]]:
    """Split a batch into parts, each of which one call of the model can score.

    Returns:
        (indices of the part's completions in the batch, the part). Only prompts and completions of a part are valid:
        its pairs are those of the whole batch.
    """
    family, inner = model_family(model), unwrapped(model)
    groups = [0 if family is None else family.group(inner, p) for p in batch.prompts]
    if len(set(groups)) == 1:
        return [(torch.arange(len(batch.completions)), batch)]
    own, parts = batch.completion_prompt.cpu(), []
    for group in sorted(set(groups)):
        here = torch.tensor([g == group for g in groups])
        index = here[own].nonzero().flatten()
        moved = here.cumsum(0) - 1
        part = replace(
            batch,
            prompts=tuple(p for p, g in zip(batch.prompts, groups, strict=True) if g == group),
            completions=tuple(batch.completions[i] for i in index.tolist()),
            completion_prompt=moved[own[index]].to(batch.completion_prompt.device),
        )
        parts.append((index, part))
    return parts
