"""Held-out measurements: one scoring pass over a fixed probe set, read by several probes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cwdpo.data.collate import PromptBatch, collate
from cwdpo.data.encode import EncodedExample
from cwdpo.records import Reading
from cwdpo.registry import Component, Registry
from cwdpo.scoring.score import distributions, score
from cwdpo.scoring.token_logp import output_head

MAX_STORED = 1 << 26
"""Most values of the reference's distributions kept for divergences (256 MiB of fp32)."""


@dataclass(frozen=True)
class HeldOut:
    """One pass of the policy over the probe set: N completions, M tokens of chosen responses.

    Attributes:
        kinds: N names: ``chosen``, or the kind of the negative.
        prompt: [N] index of the prompt.
        sum_logp, start_sum_logp: [N] nats, now and at the start of the stage.
        n_tokens: [N] tokens.
        entropy, top1, correct: [M] of the policy on chosen tokens.
        logp, start_logp: [m, V] log-probabilities on the chosen tokens of as many prompts as fit
            :data:`MAX_STORED`, now and at the start of the stage; ``None`` where none fits.
        floor, tau: the cooling in force, nats per token, or ``None``.
        step: optimizer step of the stage.
    """

    kinds: tuple[str, ...]
    prompt: Tensor
    sum_logp: Tensor
    start_sum_logp: Tensor
    n_tokens: Tensor
    entropy: Tensor
    top1: Tensor
    correct: Tensor
    logp: Tensor | None = None
    start_logp: Tensor | None = None
    floor: float | None = None
    tau: float | None = None
    step: int = 0

    @property
    def mean_logp(self) -> Tensor:
        """[N] nats per token."""
        return self.sum_logp / self.n_tokens

    def of(self, kind: str) -> Tensor:
        """[N] True for completions of a kind."""
        return torch.tensor([k == kind for k in self.kinds])

    def kind_names(self) -> list[str]:
        """``chosen`` first, then the kinds of negatives in alphabetical order."""
        return ["chosen", *sorted(set(self.kinds) - {"chosen"})]

    def reading(self, name: str, values: Tensor, unit: str) -> Reading:
        """The mean of ``values`` with its count; the mean of nothing is ``None``."""
        value = float(values.double().mean()) if values.numel() else None
        return Reading(name, value, values.numel(), unit, self.step)


class Probe(Component):
    """Reads numbers off one held-out pass."""

    @abstractmethod
    def __call__(self, held: HeldOut) -> list[Reading]:
        """The probe's readings."""


PROBES: Registry[Probe] = Registry("probe", "cwdpo.probes", Probe)


class ProbeSet:
    """A fixed set of held-out completions and what the policy said of them at the start of the stage.

    Args:
        examples: encoded held-out examples; every negative is scored, by kind.
        model: the policy at the start of the stage.
        batch_size: prompts per forward.
    """

    def __init__(self, examples: Sequence[EncodedExample], model: nn.Module, batch_size: int = 32) -> None:
        order = sorted(range(len(examples)), key=lambda i: (examples[i].n_tokens, i))
        ordered = [examples[i] for i in order]
        self.batches = [collate(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
        bare = self._within_budget(examples, vocabulary_size(model))
        self.chosen_batches = [collate(bare[i : i + batch_size]) for i in range(0, len(bare), batch_size)]
        self._start: tuple[Tensor, Tensor | None] | None = None
        start = self.measure(model)
        self._start = start.sum_logp, start.logp

    @staticmethod
    def _within_budget(examples: Sequence[EncodedExample], vocabulary: int) -> list[EncodedExample]:
        """The first examples, without negatives, whose chosen tokens' distributions may be kept."""
        kept: list[EncodedExample] = []
        tokens = 0
        for example in examples:
            tokens += len(example.chosen.ids)
            if tokens * vocabulary > MAX_STORED:
                break
            kept.append(replace(example, negatives=()))
        return kept

    @torch.no_grad()
    def measure(
        self, model: nn.Module, step: int = 0, floor: float | None = None, tau: float | None = None
    ) -> HeldOut:
        """One pass of the current policy over the set."""
        was_training = model.training
        model.eval()
        parts = [self._measure_batch(model, batch) for batch in self.batches]
        kinds: list[str] = []
        prompts: list[Tensor] = []
        offset = 0
        for batch in self.batches:
            rejected = set(batch.rejected.tolist())
            kinds += [
                c.kind or "rejected" if i in rejected else "chosen" for i, c in enumerate(batch.completions)
            ]
            prompts.append(batch.completion_prompt + offset)
            offset += len(batch.prompts)
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        found = [distributions(model, batch).cpu() for batch in self.chosen_batches]
        logp = torch.cat(found) if found else None
        model.train(was_training)
        sum_logp, n_tokens, entropy, top1, correct = columns
        start, start_logp = (sum_logp, logp) if self._start is None else self._start
        return HeldOut(
            tuple(kinds), torch.cat(prompts), sum_logp, start, n_tokens, entropy, top1, correct,
            logp, start_logp, floor, tau, step,
        )  # fmt: skip

    @staticmethod
    def _measure_batch(model: nn.Module, batch: PromptBatch) -> tuple[Tensor, ...]:
        tokens = score(model, batch, details=True)
        assert tokens.entropy is not None
        assert tokens.top1 is not None
        assert tokens.correct is not None
        chosen = torch.zeros(len(batch.completions), dtype=torch.bool)
        chosen[batch.chosen] = True
        inside = tokens.mask & chosen[:, None].to(tokens.mask.device)
        details = (tokens.entropy[inside], tokens.top1[inside], tokens.correct[inside])
        return tuple(t.cpu() for t in (tokens.logp.double().sum(1), tokens.mask.sum(1), *details))


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens that the model's head distinguishes."""
    weight = output_head(model).weight
    return int(weight.shape[0])
