"""Held-out measurements: one scoring pass over a fixed probe set, read by several probes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample
from cwdpo.objectives.base import Scale
from cwdpo.records import Reading
from cwdpo.registry import Component, Registry
from cwdpo.scoring.score import score
from cwdpo.scoring.token_logp import output_head
from cwdpo.scoring.token_stats import DETAILS

MAX_STORED = 1 << 26
"""Most values of the reference's distributions kept for the divergences of a type (256 MiB of fp32)."""
PADDING = 512
"""Tokens of padding that cost no more than a further forward."""
WHOLE = ("chosen", "chosen_initial")
"""Response types whose full vocabulary distributions are kept (for KL, TV and JS)."""


@dataclass(frozen=True)
class OneStep:
    """U training examples against N held-out responses; each update starts from the same weights.

    Attributes:
        kinds: N response types.
        predicted: [U, N] ``<grad mean_logp(o), -eta * grad loss(u)>``, nats per token: first order in eta.
        actual: [U, N] change of mean_logp after the weights went by ``-eta * grad loss(u)``.
        eta: [U] lengths of the steps.
        belief: [N] ``|A|``: L1 norm of ``e - p``, mean over the response's tokens.
        residual: [U] ``|G|``: L1 norm of d loss / d logits, summed over the example's tokens.
    """

    kinds: tuple[str, ...]
    predicted: Tensor
    actual: Tensor
    eta: Tensor
    belief: Tensor
    residual: Tensor

    @property
    def sign_agreement(self) -> float:
        """Share of changes whose sign was predicted."""
        return float((self.predicted.sign() == self.actual.sign()).double().mean())

    @property
    def correlation(self) -> float | None:
        """Pearson of predicted and actual over all U * N; ``None`` where one does not vary."""
        both = torch.stack([self.predicted.flatten(), self.actual.flatten()]).double()
        if both.shape[1] < 2:
            return None
        return float(torch.corrcoef(both)[0, 1]) if bool((both.std(1) > 0).all()) else None

    def kernel_of(self, kind: str) -> Tensor:
        """[U * n] effective kernel of a type: predicted change per unit of eta, ``|A|`` and ``|G|``.

        It is what of the empirical neural tangent kernel K couples the example with the response: positive
        where learning from the example raises the response.
        """
        own = torch.tensor([k == kind for k in self.kinds])
        scale = self.eta[:, None] * self.residual[:, None] * self.belief[None, own]
        return (self.predicted[:, own] / scale.clamp_min(1e-30)).flatten()


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
    scale: Scale = field(default_factory=Scale)
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
        batch_size: most prompts of a forward.
        extras: further responses by example id; their ``kind`` is the response type.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        model: nn.Module,
        batch_size: int = 32,
        extras: Mapping[str, Sequence[EncodedCompletion]] | None = None,
    ) -> None:
        rows = []
        for index, example in enumerate(examples):
            added = (extras or {}).get(example.id, ())
            own = [_Response("chosen", example.chosen, index)]
            own += [_Response(c.kind or "rejected", c, index, negative=True) for c in example.negatives]
            own += [_Response(c.kind, c, index) for c in added]
            rows.append((with_responses(example, added), own))
        self._keep_whole([r for _, own in rows for r in own], vocabulary_size(model))
        self._batches = [
            _Batch(collate([e for e, _ in part]), [r for _, own in part for r in own])
            for part in _of_like_length(rows, batch_size)
        ]
        responses = [r for part in self._batches for r in part.responses]
        self._order = sorted(
            range(len(responses)), key=lambda i: (responses[i].kind != "chosen", responses[i].prompt)
        )
        self._responses = [responses[i] for i in self._order]
        self._first: HeldOut | None = None  # what the first measurement compares with: itself
        self._first = self.measure(model)

    @staticmethod
    def _keep_whole(responses: Sequence[_Response], vocabulary: int) -> None:
        """Mark the first responses of each type in :data:`WHOLE` whose distributions may be kept."""
        for kind in WHOLE:
            tokens = 0
            for response in (r for r in responses if r.kind == kind):
                tokens += len(response.completion.ids)
                if tokens * vocabulary > MAX_STORED:
                    break
                response.whole = True

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int = 0, scale: Scale | None = None) -> HeldOut:
        """One pass of the current policy over the set: every prompt and every response is run once."""
        was_training = model.training
        model.eval()
        found = [one for batch in self._batches for one in batch.scored(model)]
        model.train(was_training)
        found = [found[i] for i in self._order]
        both = list(zip(self._responses, found, strict=True))
        sum_logp = torch.stack([f.logp.sum() for f in found])
        whole = {kind: [f.whole for r, f in both if r.whole and r.kind == kind] for kind in WHOLE}
        now = {kind: torch.cat(parts) for kind, parts in whole.items() if parts}
        first = self._first
        start = now if first is None else {"chosen": first.logp, **{k: p for k, (p, _) in first.own.items()}}
        pairs = {kind: (logp, start[kind]) for kind, logp in now.items()}
        logp, start_logp = pairs.pop("chosen", (None, None))
        chosen = [f for r, f in both if r.kind == "chosen"]
        return HeldOut(
            kinds=tuple(r.kind for r in self._responses),
            prompt=torch.tensor([r.prompt for r in self._responses]),
            sum_logp=sum_logp,
            start_sum_logp=sum_logp if first is None else first.sum_logp,
            n_tokens=torch.tensor([len(f.logp) for f in found]),
            entropy=torch.cat([f.entropy for f in chosen]),
            top1=torch.cat([f.top1 for f in chosen]),
            correct=torch.cat([f.correct for f in chosen]),
            logp=logp,
            start_logp=start_logp,
            scale=scale or Scale(),
            step=step,
            negative=torch.tensor([r.negative for r in self._responses]),
            origins=tuple(r.completion.origin for r in self._responses),
            sum_p=torch.stack([f.logp.exp().sum() for f in found]),
            own=pairs,
        )

    def at_start(self, scale: Scale | None = None) -> HeldOut:
        """The measurement that was taken when the set was made."""
        assert self._first is not None
        return replace(self._first, scale=scale or Scale())


@dataclass
class _Response:
    """A response of the set; ``whole``: its distributions over the vocabulary are kept."""

    kind: str
    completion: EncodedCompletion
    prompt: int
    negative: bool = False
    whole: bool = False


class _Scored(NamedTuple):
    """Of one response with C tokens: [C] each, and its distributions [C, V] where they are kept."""

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    correct: Tensor
    whole: Tensor


@dataclass(frozen=True)
class _Batch:
    """Responses in the order of the batch's completions."""

    batch: PromptBatch
    responses: Sequence[_Response]

    def scored(self, model: nn.Module) -> list[_Scored]:
        """Every response of the batch from one forward."""
        wanted = torch.tensor([r.whole for r in self.responses])
        tokens = score(model, self.batch, stats=DETAILS, whole=wanted)
        lengths = [len(r.completion.ids) for r in self.responses]
        kept = [n if r.whole else 0 for n, r in zip(lengths, self.responses, strict=True)]
        assert tokens.whole is not None
        whole = tokens.whole.cpu().split(kept)
        columns = [tokens.logp.double(), *(tokens.stats[name] for name in DETAILS)]
        logp, entropy, top1, correct = (c.cpu() for c in columns)
        return [
            _Scored(logp[i, :n], entropy[i, :n], top1[i, :n], correct[i, :n], whole[i])
            for i, n in enumerate(lengths)
        ]


_Row = tuple[EncodedExample, list[_Response]]


def _row_length(row: _Row) -> int:
    example, own = row
    return len(example.prompt.input_ids) + sum(len(r.completion.ids) for r in own)


def _of_like_length(rows: Sequence[_Row], most: int) -> Iterator[list[_Row]]:
    """Prompts with all their responses, in batches that padding makes little longer."""
    part: list[_Row] = []
    tokens = 0
    for row in sorted(rows, key=_row_length):
        length = _row_length(row)
        padding = len(part) * length - tokens
        if len(part) == most or padding > max(PADDING, tokens // 10):
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += length
    if part:
        yield part


def with_responses(example: EncodedExample, added: Sequence[EncodedCompletion]) -> EncodedExample:
    """The example with further responses behind its negatives, to be scored with them."""
    return replace(example, negatives=(*example.negatives, *added))


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens that the model's head distinguishes."""
    weight = output_head(model).weight
    return int(weight.shape[0])
