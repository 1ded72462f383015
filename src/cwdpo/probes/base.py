"""What a probe receives and what it returns.

Torch is not imported at module level: the recipe's checks need the names of the readings, and must start fast.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from cwdpo.objectives.base import Scale
from cwdpo.records import Reading
from cwdpo.registry import Component, Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OneStep:
    """The effect of one update on each of U training examples (u) on N held-out responses (o).

    Each update starts from the same weights.

    Attributes:
        kinds: the N response types.
        predicted: [U, N] ``<grad mean_logp(o), -eta * grad loss(u)>``, the change of mean_logp to first order in eta,
            in nats per token.
        actual: [U, N] measured change of mean_logp after the weights changed by ``-eta * grad loss(u)``, in nats per
            token.
        eta: [U] learning rate of each update.
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
        """Share of the changes whose sign was predicted correctly."""
        return float((self.predicted.sign() == self.actual.sign()).double().mean())

    @property
    def correlation(self) -> float | None:
        """Pearson correlation of predicted and actual changes, over all U * N; ``None`` if one of them is constant."""
        ours, theirs = self.predicted.flatten().double(), self.actual.flatten().double()
        varied = len(ours) > 1 and float(ours.std()) > 0 and float(theirs.std()) > 0
        return pearson(ours, theirs) if varied else None

    def kernel_of(self, kind: str) -> Tensor:
        """[U * n] effective kernel for a response type: predicted change divided by ``eta * |A| * |G|``.

        This is the part of the empirical neural tangent kernel K that connects the example with the response. It is
        positive if training on the example makes the response more likely.
        """
        own = mask_of(self.kinds, kind)
        scale = self.eta[:, None] * self.residual[:, None] * self.belief[None, own]
        return (self.predicted[:, own] / scale.clamp_min(1e-30)).flatten()


@dataclass(frozen=True)
class HeldOut:
    """One pass of the policy over the probe set: N completions, M tokens of chosen responses.

    Attributes:
        kinds: the N response types: ``chosen``, the kind of a negative, or a type of
            :data:`cwdpo.dynamics.settings.TYPES`.
        prompt: [N] index of the completion's prompt.
        sum_logp, start_sum_logp: [N] log-likelihood in nats, now and at the start of the stage.
        n_tokens: [N] number of tokens.
        entropy, top1, correct: [M] token statistics of the policy on chosen tokens; entropy in nats.
        logp, start_logp: [m, V] log-probabilities over the vocabulary, in nats, on the chosen tokens of the first
            prompts, as many as memory allows, now and at the start of the stage; ``None`` if not even one prompt fits.
        scale: of the current objective.
        step: optimizer step of the stage.
        negative: [N] True for the negatives of the data's pairs; ``None`` means all but ``chosen``.
        origins: the N origins; may be empty.
        sum_p: [N] sum over tokens of the token's probability, or ``None``.
        own: by type: the two tensors [m, V] like ``logp`` and ``start_logp``, on tokens of responses that the policy
            sampled.
        sampled: by type: each response that the policy sampled, as its text and whether it ended by itself.
        one_step: predicted and actual changes after one update, if requested.
        sources: the source of each prompt in a mixture of data sets; empty without one.
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
    sources: tuple[str, ...] = ()

    @property
    def mean_logp(self) -> Tensor:
        """[N] log-likelihood per token, in nats."""
        return self.sum_logp / self.n_tokens

    @property
    def shift(self) -> Tensor:
        """[N] change of sum_logp since the start of the stage, in nats."""
        return self.sum_logp - self.start_sum_logp

    def of(self, kind: str) -> Tensor:
        """[N] True for completions of a kind."""
        return mask_of(self.kinds, kind)

    @property
    def negatives(self) -> Tensor:
        """[N] True for the negatives of the data's pairs."""
        return ~self.of("chosen") if self.negative is None else self.negative

    @property
    def pair_chosen_shift(self) -> Tensor:
        """[P] shift of the chosen response that belongs to each negative, in nats, in the order of the negatives."""
        by_prompt = self.shift.new_zeros(int(self.prompt.max()) + 1)
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
        """The mean of ``values`` [n] with n and a 95% t interval; for n = 0 the value is ``None``."""
        from scipy.special import stdtrit

        if not values.numel():
            return Reading(name, None, 0, unit, self.step)
        values, n = values.double(), values.numel()
        mean = float(values.mean())
        half = float(stdtrit(n - 1, 0.975)) * float(values.std()) / n**0.5 if n > 1 else None
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Reading(name, mean, n, unit, self.step, low=low, high=high)

    def plus(self, part: HeldOut, kind: str) -> HeldOut:
        """This pass joined with a pass over sampled responses (the chosen ones of ``part``), as type ``kind``."""
        import torch

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
            sources=(*self.sources, *[""] * (int(part.prompt.max()) + 1)) if self.sources else (),
        )


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of two tensors [n]."""
    import torch

    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def mask_of(names: Sequence[str], name: str) -> Tensor:
    """[N] True where ``names`` holds ``name``."""
    import torch

    return torch.tensor([n == name for n in names])


class Probe(Component):
    """Computes readings from one held-out pass.

    ``readings``: the names of its readings, which stopping rules may use. To a name that ends in ``/`` a response type
    is appended.
    """

    readings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, held: HeldOut) -> list[Reading]:
        """The probe's readings."""


PROBES: Registry[Probe] = Registry("probe", "cwdpo.probes", Probe)


def known_readings(extra: Iterable[Mapping[str, Any]] = ()) -> tuple[str, ...]:
    """The names in :attr:`Probe.readings` of all shipped probes and of ``extra`` ones.

    Args:
        extra: further probes, each a mapping with ``name`` and settings.
    """
    shipped = [PROBES.get(name) for name in PROBES.names()]
    more = [PROBES.get(str(spec["name"])) for spec in extra]
    return tuple(reading for probe in (*shipped, *more) for reading in probe.readings)
