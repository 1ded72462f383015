"""Held-out measurements: one scoring pass over a fixed probe set, read by several probes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from cwdpo.data.collate import PromptBatch, collate
from cwdpo.data.encode import EncodedCompletion, EncodedExample
from cwdpo.records import Reading
from cwdpo.registry import Component, Registry
from cwdpo.scoring.score import distributions, score
from cwdpo.scoring.token_logp import output_head

if TYPE_CHECKING:
    from cwdpo.probes._influence import OneStep

MAX_STORED = 1 << 26
"""Most values of the reference's distributions kept for divergences (256 MiB of fp32)."""


@dataclass(frozen=True)
class Scale:
    """What of the objective in force the probes need.

    Attributes:
        floor, tau: of the cooling, nats per token; ``None`` where the objective does not cool adaptively.
        beta: inverse temperature, per nat; ``None`` where the objective has no preference term.
        weight: the fixed weight of negatives where the objective does not cool; 1 is DPO.
    """

    floor: float | None = None
    tau: float | None = None
    beta: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class HeldOut:
    """One pass of the policy over the probe set: N completions, M tokens of chosen responses.

    Attributes:
        kinds: N names of response types: ``chosen``, the kind of a negative, or a type of
            :data:`cwdpo.dynamics.settings.TYPES`.
        prompt: [N] index of the prompt.
        sum_logp, start_sum_logp: [N] nats, now and at the start of the stage.
        n_tokens: [N] tokens.
        entropy, top1, correct: [M] of the policy on chosen tokens.
        logp, start_logp: [m, V] log-probabilities on the chosen tokens of as many prompts as fit
            :data:`MAX_STORED`, now and at the start of the stage; ``None`` where none fits.
        scale: of the objective in force.
        step: optimizer step of the stage.
        negative: [N] True for the negatives of the data's pairs; ``None``: all but ``chosen``.
        origins: N origins, or empty where nobody asks.
        sum_p: [N] sum over tokens of the token's probability, or ``None``.
        own: [m, V] pairs like (logp, start_logp), on the tokens of responses that the policy sampled, by type.
        sampled: text and whether it ended by itself, of each response that the policy sampled, by type.
        one_step: predicted and actual changes of one update, where they were asked for.
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
    scale: Scale = Scale()
    step: int = 0
    negative: Tensor | None = None
    origins: tuple[str, ...] = ()
    sum_p: Tensor | None = None
    own: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sampled: Mapping[str, Sequence[tuple[str, bool]]] = field(default_factory=dict)
    one_step: OneStep | None = None

    @property
    def mean_logp(self) -> Tensor:
        """[N] nats per token."""
        return self.sum_logp / self.n_tokens

    @property
    def shift(self) -> Tensor:
        """[N] change of sum_logp since the start of the stage, nats."""
        return self.sum_logp - self.start_sum_logp

    def of(self, kind: str) -> Tensor:
        """[N] True for completions of a kind."""
        return torch.tensor([k == kind for k in self.kinds])

    @property
    def negatives(self) -> Tensor:
        """[N] True for the negatives of the data's pairs."""
        return ~self.of("chosen") if self.negative is None else self.negative

    @property
    def pair_chosen_shift(self) -> Tensor:
        """[P] shift of the chosen response of each negative, in the order of :attr:`negatives`."""
        by_prompt = torch.zeros(int(self.prompt.max()) + 1, dtype=self.shift.dtype)
        chosen = self.of("chosen")
        by_prompt[self.prompt[chosen]] = self.shift[chosen]
        return by_prompt[self.prompt[self.negatives]]

    def kind_names(self) -> list[str]:
        """``chosen`` first, then the others in alphabetical order."""
        return ["chosen", *sorted(set(self.kinds) - {"chosen"})]

    def negative_kinds(self) -> list[str]:
        """Kinds of the negatives, in alphabetical order."""
        return sorted({k for k, n in zip(self.kinds, self.negatives.tolist(), strict=True) if n})

    def reading(self, name: str, values: Tensor, unit: str) -> Reading:
        """The mean of ``values`` with its count and 95% t interval; the mean of nothing is ``None``."""
        if not values.numel():
            return Reading(name, None, 0, unit, self.step)
        values, n = values.double(), values.numel()
        mean = float(values.mean())
        half = float(stdtrit(n - 1, 0.975)) * float(values.std()) / n**0.5 if n > 1 else None
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Reading(name, mean, n, unit, self.step, low=low, high=high)

    def plus(self, part: HeldOut, kind: str) -> HeldOut:
        """This pass and one over responses that a policy sampled, which :class:`ProbeSet` took for chosen."""
        both = {
            name: torch.cat([getattr(self, name), getattr(part, name)])
            for name in ("sum_logp", "start_sum_logp", "n_tokens", "sum_p")
        }
        own = {} if part.logp is None or part.start_logp is None else {kind: (part.logp, part.start_logp)}
        return replace(
            self,
            **both,
            kinds=(*self.kinds, *([kind] * len(part.kinds))),
            origins=(*self.origins, *part.origins),
            prompt=torch.cat([self.prompt, part.prompt + int(self.prompt.max()) + 1]),
            negative=torch.cat([self.negatives, torch.zeros(len(part.kinds), dtype=torch.bool)]),
            own={**self.own, **own},
        )


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
        extras: further responses by example id; their ``kind`` is the response type.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        model: nn.Module,
        batch_size: int = 32,
        extras: Mapping[str, Sequence[EncodedCompletion]] | None = None,
    ) -> None:
        self._rows: list[tuple[str, int, bool, str]] = []  # kind, prompt, negative, origin
        bare = self._within_budget(examples, vocabulary_size(model))
        self._chosen = [collate(bare[i : i + batch_size]) for i in range(0, len(bare), batch_size)]
        self._rows += [("chosen", i, False, e.chosen.origin) for i, e in enumerate(bare)]
        rest = []
        for i, example in enumerate(examples):
            added = tuple((extras or {}).get(example.id, ()))
            chosen = (example.chosen,) if i >= len(bare) else ()
            if chosen or example.negatives or added:
                rest.append((i, example, chosen, added))
        rest.sort(key=lambda row: (row[1].n_tokens, row[0]))
        self._others = [self._lay_out(rest[k : k + batch_size]) for k in range(0, len(rest), batch_size)]
        self._start: tuple[Tensor, Tensor | None] | None = None
        self._first = self.measure(model)
        self._start = self._first.sum_logp, self._first.logp

    def _lay_out(
        self,
        rows: Sequence[tuple[int, EncodedExample, Sequence[EncodedCompletion], Sequence[EncodedCompletion]]],
    ) -> PromptBatch:
        """A batch of what is not scored with its whole distributions, noted completion by completion."""
        completions: list[EncodedCompletion] = []
        prompts: list[int] = []
        chosen_at: list[int] = []
        for position, (index, example, chosen, added) in enumerate(rows):
            chosen_at += [len(completions)] * len(chosen)
            own = (*chosen, *example.negatives, *added)
            completions += own
            prompts += [position] * len(own)
            self._rows += [("chosen", index, False, c.origin) for c in chosen]
            self._rows += [(c.kind or "rejected", index, True, c.origin) for c in example.negatives]
            self._rows += [(c.kind, index, False, c.origin) for c in added]
        empty = torch.zeros(0, dtype=torch.long)
        return PromptBatch(
            tuple(e.id for _, e, _, _ in rows), tuple(e.prompt for _, e, _, _ in rows), tuple(completions),
            torch.tensor(prompts), torch.tensor(chosen_at, dtype=torch.long), empty, empty,
        )  # fmt: skip

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
    def measure(self, model: nn.Module, step: int = 0, scale: Scale | None = None) -> HeldOut:
        """One pass of the current policy over the set: every response is run once."""
        was_training = model.training
        model.eval()
        found = [distributions(model, batch).cpu() for batch in self._chosen]
        parts = [_read_off(logp, batch) for logp, batch in zip(found, self._chosen, strict=True)]
        parts += [_scored(model, batch) for batch in self._others]
        model.train(was_training)
        logp = torch.cat(found) if found else None
        sum_logp, n_tokens, sum_p, entropy, top1, correct = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        start, start_logp = (sum_logp, logp) if self._start is None else self._start
        kinds, prompts, negative, origins = zip(*self._rows, strict=True)
        return HeldOut(
            kinds, torch.tensor(prompts), sum_logp, start, n_tokens, entropy, top1, correct, logp, start_logp,
            scale or Scale(), step, torch.tensor(negative), origins, sum_p,
        )  # fmt: skip

    def at_start(self, scale: Scale | None = None) -> HeldOut:
        """The measurement that was taken when the set was made."""
        first: HeldOut = self._first
        return replace(first, scale=scale or Scale())


def _read_off(logp: Tensor, batch: PromptBatch) -> tuple[Tensor, ...]:
    """Sums and token details of chosen responses from their distributions [M, V]."""
    lengths = [len(c.ids) for c in batch.completions]
    targets = torch.tensor([token for c in batch.completions for token in c.ids])
    own = logp.gather(-1, targets[:, None])[:, 0].double()
    top1, best = logp.max(-1)
    entropy = torch.cat([-(part.exp() * part).sum(-1) for part in logp.split(256)])
    sums = [torch.stack([part.sum() for part in values.split(lengths)]) for values in (own, own.exp())]
    return sums[0], torch.tensor(lengths), sums[1], entropy, top1.exp(), (best == targets).float()


def _scored(model: nn.Module, batch: PromptBatch) -> tuple[Tensor, ...]:
    """The same from a scoring pass; token details of the chosen responses among the completions."""
    tokens = score(model, batch, details=True)
    assert tokens.entropy is not None
    assert tokens.top1 is not None
    assert tokens.correct is not None
    chosen = torch.zeros(len(batch.completions), dtype=torch.bool)
    chosen[batch.chosen] = True
    inside = tokens.mask & chosen[:, None].to(tokens.mask.device)
    logp = tokens.logp.double()
    sums = (logp.sum(1), tokens.mask.sum(1), (logp.exp() * tokens.mask).sum(1))
    details = (tokens.entropy[inside], tokens.top1[inside], tokens.correct[inside])
    return tuple(t.cpu() for t in (*sums, *details))


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens that the model's head distinguishes."""
    weight = output_head(model).weight
    return int(weight.shape[0])
