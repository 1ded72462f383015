"""Collates encoded examples to a :class:`PromptBatch`: each prompt once, its completions with a pair index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, EncodedPrompt


@dataclass(frozen=True)
class PromptBatch:
    """B examples, N completions and P pairs; index tensors say which completion belongs to which prompt and pair.

    Attributes:
        example_ids: ids of the B examples.
        prompts: the encoded prompts: those of the B examples, then those of image-side negatives.
        completions: the N encoded completions.
        completion_prompt: [N] which of ``prompts`` each completion belongs to.
        chosen: [B] index of each example's chosen completion.
        rejected: [P] index of each pair's rejected completion.
        pair_prompt: [P] the example (and so the chosen completion) of each pair, in 0..B-1.
        sources: of the B examples; empty texts without a mixture.
    """

    example_ids: tuple[str, ...]
    prompts: tuple[EncodedPrompt, ...]
    completions: tuple[EncodedCompletion, ...]
    completion_prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    pair_prompt: Tensor
    sources: tuple[str, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptBatch:
        """The batch with its index tensors on ``device``; image tensors are moved when the rows are built."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def n_chosen_tokens(self) -> int:
        """Number of tokens of all chosen completions."""
        return sum(len(self.completions[i].ids) for i in self.chosen.tolist())

    @property
    def n_rejected_tokens(self) -> int:
        """Number of tokens of all rejected completions."""
        return sum(len(self.completions[i].ids) for i in self.rejected.tolist())

    @property
    def n_paired_prompts(self) -> int:
        """Number of prompts with at least one negative."""
        return int(self.pair_prompt.unique().numel())

    def keep_pairs(self, keep: Sequence[bool]) -> PromptBatch:
        """The batch with the pairs where ``keep`` ([P]) is true; every prompt and chosen completion is kept."""
        if all(keep):
            return self
        return self._kept(len(self.example_ids), torch.tensor(keep, device=self.rejected.device))

    def first_examples(self, n: int) -> PromptBatch:
        """The first ``n`` examples with their completions and pairs; ``n`` may be 0."""
        return self._kept(n, self.pair_prompt < n)

    def _kept(self, n: int, pairs: Tensor) -> PromptBatch:
        """The first ``n`` examples with the pairs where ``pairs`` ([P]) is true, and without unused prompts."""
        own = [self.chosen[:n], self.rejected[pairs]]
        completions = torch.zeros(len(self.completions), dtype=torch.bool, device=pairs.device)
        completions[torch.cat(own)] = True
        prompts = torch.zeros(len(self.prompts), dtype=torch.bool, device=pairs.device)
        prompts[self.completion_prompt[completions]] = True
        chosen, rejected = ((completions.cumsum(0) - 1)[index] for index in own)  # moved to their new places
        return PromptBatch(
            self.example_ids[:n],
            tuple(p for p, stays in zip(self.prompts, prompts.tolist(), strict=True) if stays),
            tuple(c for c, stays in zip(self.completions, completions.tolist(), strict=True) if stays),
            (prompts.cumsum(0) - 1)[self.completion_prompt[completions]],
            chosen,
            rejected,
            self.pair_prompt[pairs],
            self.sources[:n],
        )

    def with_silent_row(self, prompt: EncodedPrompt) -> PromptBatch:
        """The batch with one more prompt, whose completion of one token is not referred to by any index.

        Its log-probability is in no sum: loss and metrics do not change, and the gradients through this row are
        zeros. But the modules that the row passes through (the vision tower) run in forward and backward.
        """
        silent = EncodedCompletion(
            prompt.input_ids[-1:], span=(0, 1), reference_sum_logp=0.0, reference_span_sum_logp=0.0
        )
        index = self.completion_prompt.new_tensor([len(self.prompts)])
        return replace(
            self,
            prompts=(*self.prompts, prompt),
            completions=(*self.completions, silent),
            completion_prompt=torch.cat([self.completion_prompt, index]),
        )

    def loaded(self) -> PromptBatch:
        """The batch with the images of its prompts in memory.

        Raises:
            DataError: an image cannot be read.
        """
        return replace(self, prompts=tuple(prompt.loaded() for prompt in self.prompts))

    def ahead(self, wanted: Callable[[EncodedPrompt], bool]) -> PromptBatch:
        """The batch whose images worker processes read from now on, see :meth:`EncodedPrompt.ahead`.

        Args:
            wanted: whether the images of a prompt will be needed.
        """
        prompts = (prompt.ahead() if wanted(prompt) else prompt for prompt in self.prompts)
        return replace(self, prompts=tuple(prompts))


def collate(examples: Sequence[EncodedExample]) -> PromptBatch:
    """Collate encoded examples to one batch."""
    completions: list[EncodedCompletion] = []
    completion_prompt: list[int] = []
    chosen: list[int] = []
    rejected: list[int] = []
    pair_prompt: list[int] = []
    prompts = [e.prompt for e in examples]
    for index, example in enumerate(examples):
        chosen.append(len(completions))
        rejected.extend(len(completions) + 1 + k for k in range(len(example.negatives)))
        pair_prompt.extend([index] * len(example.negatives))
        others = {id(p): len(prompts) + k for k, p in enumerate(example.prompts[1:])}
        prompts.extend(example.prompts[1:])
        completion_prompt.extend(others.get(id(c.prompt), index) for c in example.completions)
        completions.extend(example.completions)
    return PromptBatch(
        tuple(e.id for e in examples),
        tuple(prompts),
        tuple(completions),
        torch.tensor(completion_prompt, dtype=torch.long),
        torch.tensor(chosen, dtype=torch.long),
        torch.tensor(rejected, dtype=torch.long),
        torch.tensor(pair_prompt, dtype=torch.long),
        tuple(e.source for e in examples),
    )


class Collator:
    """``data_collator`` of the trainer: makes ``{"batch": PromptBatch}`` from a list of encoded examples."""

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """Collate one micro-batch."""
        return {"batch": collate(examples)}
