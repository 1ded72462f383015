"""Held-out measurements: one scoring pass over a fixed probe set, read by several probes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwdpo.data.collate import PromptBatch, collate
from cwdpo.data.encode import EncodedExample
from cwdpo.records import Reading
from cwdpo.registry import Component, Registry
from cwdpo.scoring import plain

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
        logp, start_logp: [M, V] log-probabilities on chosen tokens, now and at the start of the stage;
            ``None`` where they would not fit.
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
        chosen_tokens = sum(b.n_chosen_tokens for b in self.batches)
        head = getattr(model.get_output_embeddings(), "out_features", MAX_STORED)  # type: ignore[operator]
        self.with_divergence = chosen_tokens * int(head) <= MAX_STORED
        self._start: tuple[Tensor, Tensor | None] | None = None
        self._start = self._start_of(model)

    def _start_of(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        held = self.measure(model)
        return held.sum_logp, held.logp

    @torch.no_grad()
    def measure(
        self, model: nn.Module, step: int = 0, floor: float | None = None, tau: float | None = None
    ) -> HeldOut:
        """One pass of the current policy over the set."""
        was_training = model.training
        model.eval()
        parts = [self._measure_batch(model, batch) for batch in self.batches]
        model.train(was_training)
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
        columns = [torch.cat(column) for column in zip(*(p[:5] for p in parts), strict=True)]
        logp = torch.cat([p[5] for p in parts]) if self.with_divergence else None
        sum_logp, n_tokens, entropy, top1, correct = columns
        start, start_logp = (sum_logp, logp) if self._start is None else self._start
        return HeldOut(
            tuple(kinds), torch.cat(prompts), sum_logp, start, n_tokens, entropy, top1, correct,
            logp, start_logp, floor, tau, step,
        )  # fmt: skip

    def _measure_batch(self, model: nn.Module, batch: PromptBatch) -> tuple[Tensor, ...]:
        tokens, logp = plain.score_with_distributions(model, batch, keep=self.with_divergence)
        assert tokens.entropy is not None
        assert tokens.top1 is not None
        assert tokens.correct is not None
        chosen = torch.zeros(len(batch.completions), dtype=torch.bool)
        chosen[batch.chosen] = True
        inside = tokens.mask & chosen[:, None].to(tokens.mask.device)
        details = (tokens.entropy[inside], tokens.top1[inside], tokens.correct[inside])
        found = [tokens.logp.double().sum(1), tokens.mask.sum(1), *details]
        if logp is not None:
            found.append(logp[inside[tokens.mask]])
        return tuple(t.cpu() for t in found)
