"""Batches that one call cannot score, because a family's rows depend on which rows they are run with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.inputs import unwrapped
from cwdpo.models.shared_attention import model_family


def parts_of(model: nn.Module, batch: PromptBatch) -> list[tuple[Tensor, PromptBatch]]:
    """The batch as parts that one call each can score: (indices of the part's completions, the part).

    Of a part only prompts and completions may be read: its pairs are those of the whole batch.
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
