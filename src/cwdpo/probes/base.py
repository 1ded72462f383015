"""What a probe receives and returns. No torch is imported here at module level, so that the names of readings are at
hand where a recipe is checked.
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
        ours, theirs = self.predicted.flatten().double(), self.actual.flatten().double()
        varied = len(ours) > 1 and float(ours.std()) > 0 and float(theirs.std()) > 0
        return pearson(ours, theirs) if varied else None

    def kernel_of(self, kind: str) -> Tensor:
        """[U * n] effective kernel of a type: predicted change per unit of eta, ``|A|`` and ``|G|``.

        It is what of the empirical neural tangent kernel K couples the example with the response: positive
        where learning from the example raises the response.
        """
        own = mask_of(self.kinds, kind)
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
        return mask_of(self.kinds, kind)

    @property
    def negatives(self) -> Tensor:
        """[N] True for the negatives of the data's pairs."""
        return ~self.of("chosen") if self.negative is None else self.negative

    @property
    def pair_chosen_shift(self) -> Tensor:
        """[P] shift of the chosen response of each negative, in the order of :attr:`negatives`."""
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
        """The mean of ``values`` with its count and 95% t interval; the mean of nothing is ``None``."""
        from scipy.special import stdtrit

        if not values.numel():
            return Reading(name, None, 0, unit, self.step)
        values, n = values.double(), values.numel()
        mean = float(values.mean())
        half = float(stdtrit(n - 1, 0.975)) * float(values.std()) / n**0.5 if n > 1 else None
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Reading(name, mean, n, unit, self.step, low=low, high=high)

    def plus(self, part: HeldOut, kind: str) -> HeldOut:
        """This pass and one over responses that a policy sampled, which are the chosen ones there."""
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
        )


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two rows of numbers [n]."""
    import torch

    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def mask_of(names: Sequence[str], name: str) -> Tensor:
    """[N] True for the places of a name."""
    import torch

    return torch.tensor([n == name for n in names])


class Probe(Component):
    """Reads numbers off one held-out pass.

    ``readings``: the names that it writes, for rules that stop a run; one that ends in ``/`` is followed by a response
    type.
    """

    readings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, held: HeldOut) -> list[Reading]:
        """The probe's readings."""


PROBES: Registry[Probe] = Registry("probe", "cwdpo.probes", Probe)


def known_readings(extra: Iterable[Mapping[str, Any]] = ()) -> tuple[str, ...]:
    """Names of the readings of all shipped probes and of further ones, as :attr:`Probe.readings` lists them.

    Args:
        extra: probes beside the shipped ones, each a mapping with ``name`` and settings.
    """
    shipped = [PROBES.get(name) for name in PROBES.names()]
    more = [PROBES.get(str(spec["name"])) for spec in extra]
    return tuple(reading for probe in (*shipped, *more) for reading in probe.readings)
