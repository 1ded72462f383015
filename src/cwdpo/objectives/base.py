"""What an objective receives and returns. Tensors are used through their own methods: no torch import,
so that settings, schema and help stay light.

Notation: B prompts, P pairs, all log-probabilities in nats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from cwdpo.registry import Component, Registry

if TYPE_CHECKING:
    from torch import Tensor

NegativeMask = Literal["none", "differing_span"]
TokenStat = Callable[["Tensor", "Tensor"], "Tensor"]
"""A statistic of each token: log-probabilities over the vocabulary [M, V] and the tokens [M] -> [M]."""


@dataclass(frozen=True)
class Scored:
    """Scores of n completions, each [n].

    Attributes:
        sum_logp: log-likelihood under the policy, summed over tokens; carries the gradient.
        n_tokens: completion tokens, the end token included.
        reference_sum_logp: the same under the frozen reference; ``None`` when no reference is used.
        span_sum_logp, span_reference_sum_logp: the sums over the differing span only.
        stats: [n] sums over tokens of the objective's ``token_stats``, by name.
        token_logp: [n, C] log-likelihood of each token, right-padded; carries the gradient.
        token_mask, token_span: [n, C] where there is a token, and which are of the differing span.
        reward_margin: of a pair, what a reward model finds chosen better by (``Completion.made``); no gradient.
    """

    sum_logp: Tensor
    n_tokens: Tensor
    reference_sum_logp: Tensor | None = None
    span_sum_logp: Tensor | None = None
    span_reference_sum_logp: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    token_logp: Tensor | None = None
    token_mask: Tensor | None = None
    token_span: Tensor | None = None
    reward_margin: Tensor | None = None

    @property
    def mean_logp(self) -> Tensor:
        """[n] log-likelihood per token, in nats."""
        return self.sum_logp / self.n_tokens

    @property
    def shift(self) -> Tensor:
        """[n] ``sum_logp(policy) - sum_logp(reference)`` (the paper's Delta)."""
        assert self.reference_sum_logp is not None, "this objective needs reference log-probabilities"
        return self.sum_logp - self.reference_sum_logp

    def masked_shift(self, mask: NegativeMask) -> Tensor:
        """[n] the shift, over all tokens or over the differing span only."""
        if mask == "none":
            return self.shift
        assert self.span_sum_logp is not None
        assert self.span_reference_sum_logp is not None
        return self.span_sum_logp - self.span_reference_sum_logp


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step: all micro-batches of all processes.

    A loss is a sum over its micro-batch divided by these, so that the losses of the micro-batches add up
    to the loss of the step. Objectives that are no such sums ask for more by ``looks_ahead``:

    Attributes:
        prompts: prompts with at least one negative.
        chosen_tokens, rejected_tokens: completion tokens.
        ahead: what :meth:`Objective.ahead` gave for every micro-batch of the step; ``None`` if nobody asked, or if
            this micro-batch is the whole step.
        memory: what :meth:`Objective.remember` kept of the steps before this one; empty at the first.
    """

    prompts: float
    chosen_tokens: float
    rejected_tokens: float
    ahead: tuple[float, ...] | None = None
    memory: tuple[float, ...] = ()


@dataclass(frozen=True)
class ScoredPairs:
    """B prompts with their chosen response and P negatives.

    Attributes:
        chosen: scores of the B chosen responses.
        rejected: scores of the P negatives.
        prompt: [P] index into the prompts; a prompt may have several negatives.
        totals: counts of the optimizer step; ``None`` means that this batch is the whole step.
    """

    chosen: Scored
    rejected: Scored
    prompt: Tensor
    totals: StepTotals | None = None

    @property
    def chosen_shift(self) -> Tensor:
        """[P] shift of each pair's chosen response."""
        return self.chosen.shift[self.prompt]

    def _count(self, name: str, own: float) -> float:
        return own if self.totals is None else float(getattr(self.totals, name))

    def mean_over_prompts(self, per_pair: Tensor) -> Tensor:
        """Scalar from per-pair values [P]: the mean over prompts of the mean over a prompt's pairs.

        Prompts without a pair do not count.
        """
        pairs = self.prompt.bincount(minlength=len(self.chosen.sum_logp))
        total = (per_pair / pairs[self.prompt]).sum()
        return total / self._count("prompts", float((pairs > 0).sum()))

    def chosen_nll(self) -> Tensor:
        """NLL of the chosen responses, nats per token: sum over tokens by number of tokens."""
        own = float(self.chosen.n_tokens.sum())
        return -self.chosen.sum_logp.sum() / self._count("chosen_tokens", own)

    def rejected_nll(self) -> Tensor:
        """This batch's share of the step's NLL of the negatives, nats per token."""
        own = float(self.rejected.n_tokens.sum())
        return -self.rejected.sum_logp.sum() / max(self._count("rejected_tokens", own), 1.0)


@dataclass(frozen=True)
class ObjectiveOutput:
    """A loss and what to log of it.

    Attributes:
        loss: scalar; this micro-batch's share of the step's loss.
        per_pair: named detached values [P] (``loss``, ``rewards/chosen``, ``cooling/weight``, ...).
        parts: named detached scalars that add up over micro-batches (``loss/nll``, ``loss/penalty``, ...).
    """

    loss: Tensor
    per_pair: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """What probes and curricula need to know of an objective.

    Attributes:
        floor, tau: of the cooling, nats per token; ``None`` if the objective does not cool adaptively.
        beta: inverse temperature, per nat; ``None`` if the objective has no preference term.
        weight: the fixed weight of negatives if the objective does not cool; 1 is DPO.
    """

    floor: float | None = None
    tau: float | None = None
    beta: float | None = None
    weight: float = 1.0


class Objective(Component):
    """A pure function :class:`ScoredPairs` -> :class:`ObjectiveOutput` with its settings.

    The class attributes say what it needs; everything else of the project asks these and no class by name.

    ``needs_negatives``: prompts without a negative are left out of this objective's data.
    ``needs_reference``: reference log-probabilities are computed before training.
    ``token_stats``: further statistics of every token, read as ``Scored.stats``: names of
    :data:`cwdpo.scoring.token_stats.TOKEN_STATS`, or functions like those.
    ``calibrates``: settings that may be ``auto``: :meth:`calibrated` finds them before training.
    """

    needs_negatives: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    token_stats: ClassVar[tuple[str | TokenStat, ...]] = ()
    calibrates: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Compute the loss of one micro-batch."""

    def keeps(self, reference_mean_logp: float) -> bool:
        """Whether a negative takes part, given its mean_logp under the reference (nats per token)."""
        del reference_mean_logp
        return True

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss depends on the whole optimizer step; see :meth:`ahead`."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether a setting of ``calibrates`` must be found before training."""
        return any(getattr(self, name) == "auto" for name in self.calibrates)

    def calibrated(self, mean_logps: Sequence[float]) -> Self:
        """The same objective with its ``auto`` settings replaced by numbers.

        Args:
            mean_logps: of samples that the reference drew, in nats per token. In rounds with
                ``negatives.recalibrate`` it is called again with the samples of the round's policy.
        """
        del mean_logps
        return self

    def probe_scale(self) -> Scale:
        """Of the calibrated objective."""
        return Scale(beta=getattr(self, "beta", None))

    def logged(self) -> Mapping[str, float]:
        """Settings to log with every row of training metrics, because calibration may have moved them."""
        return {}

    def ahead(self, pairs: ScoredPairs) -> Sequence[float]:
        """With ``looks_ahead``: what must be known of every micro-batch before the first loss of a step.

        Computed without gradient; the values of all micro-batches and processes are joined in ``totals.ahead``. A step
        of one micro-batch is not scored twice for it: ``totals.ahead`` is ``None``, and the objective has the pairs.
        """
        raise NotImplementedError(f"{type(self).__name__} looks ahead and does not say at what")

    def remember(self, memory: tuple[float, ...], ahead: tuple[float, ...]) -> tuple[float, ...]:
        """With ``looks_ahead``: what to keep for later steps, from what was kept and the values of this step.

        Stored in checkpoints; the loss of a step sees what was kept before it, as ``totals.memory``.
        """
        del memory, ahead
        return ()


@dataclass
class InForce:
    """The objective that a stage trains with now. Trainer, probes, rounds and curriculum share one of these, so
    that a new calibration reaches all of them."""

    objective: Objective


def negative_log_sigmoid(x: Tensor) -> Tensor:
    """``-log sigmoid(x)`` of values [P], finite with a finite gradient for any x.

    >>> import torch
    >>> negative_log_sigmoid(torch.tensor([0.0, -1000.0])).tolist()
    [0.6931471824645996, 1000.0]
    """
    return x.new_zeros(()).logaddexp(-x)


def rewards(pairs: ScoredPairs, beta: float) -> dict[str, Tensor]:
    """TRL's implicit rewards ``beta * shift`` of both sides, detached, each [P]."""
    chosen, rejected = beta * pairs.chosen_shift.detach(), beta * pairs.rejected.shift.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }


def pair_output(pairs: ScoredPairs, per_pair: Tensor, beta: float, **also: Tensor) -> ObjectiveOutput:
    """The output of a loss that is a mean of pairs: their losses [P], the rewards, and whatever else is named."""
    loss = pairs.mean_over_prompts(per_pair)
    logged = {"loss/pair": per_pair.detach(), **{k: v.detach() for k, v in also.items()}}
    return ObjectiveOutput(
        loss, per_pair={**logged, **rewards(pairs, beta)}, parts={"loss/preference": loss.detach()}
    )


OBJECTIVES: Registry[Objective] = Registry("objective", "cwdpo.objectives", Objective)
