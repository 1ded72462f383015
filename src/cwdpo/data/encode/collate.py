"""Encoded examples to a :class:`PromptBatch`: each prompt once, its completions with a pair index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, EncodedPrompt


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, N completions and P pairs, as indices: nothing depends on a position in the batch.

    Attributes:
        example_ids: ids of the B examples.
        prompts: the B encoded prompts.
        completions: the N encoded completions.
        completion_prompt: [N] which prompt each completion belongs to.
        chosen: [B] index of each prompt's chosen completion.
        rejected: [P] index of each pair's rejected completion.
        pair_prompt: [P] the prompt (and so the chosen completion) of each pair.
    """

    example_ids: tuple[str, ...]
    prompts: tuple[EncodedPrompt, ...]
    completions: tuple[EncodedCompletion, ...]
    completion_prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    pair_prompt: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptBatch:
        """The batch with its index tensors on ``device``; image tensors move when a row is laid out."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def n_chosen_tokens(self) -> int:
        """Completion tokens of all chosen responses."""
        return sum(len(self.completions[i].ids) for i in self.chosen.tolist())

    @property
    def n_rejected_tokens(self) -> int:
        """Completion tokens of all rejected responses."""
        return sum(len(self.completions[i].ids) for i in self.rejected.tolist())

    @property
    def n_paired_prompts(self) -> int:
        """Prompts with at least one negative."""
        return int(self.pair_prompt.unique().numel())


def collate(examples: Sequence[EncodedExample]) -> PromptBatch:
    """Gather encoded examples into one batch."""
    completions: list[EncodedCompletion] = []
    completion_prompt: list[int] = []
    chosen: list[int] = []
    rejected: list[int] = []
    pair_prompt: list[int] = []
    for prompt, example in enumerate(examples):
        chosen.append(len(completions))
        rejected.extend(len(completions) + 1 + k for k in range(len(example.negatives)))
        pair_prompt.extend([prompt] * len(example.negatives))
        completion_prompt.extend([prompt] * (1 + len(example.negatives)))
        completions.extend((example.chosen, *example.negatives))
    return PromptBatch(
        tuple(e.id for e in examples),
        tuple(e.prompt for e in examples),
        tuple(completions),
        *(torch.tensor(x, dtype=torch.long) for x in (completion_prompt, chosen, rejected, pair_prompt)),
    )


class Collator:
    """``data_collator`` of the trainer: a list of encoded examples to ``{"batch": PromptBatch}``."""

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """Collate one micro-batch."""
        return {"batch": collate(examples)}
