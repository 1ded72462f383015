"""What an objective receives and what it returns.

This room does not import torch: it uses tensors through their methods only. Recipes, the schema and the command-line
help import the objectives for their settings, and must start fast.

Notation: B prompts, P pairs, n completions of at most C tokens. All log-probabilities are in nats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from cwdpo.registry import Component, Registry

if TYPE_CHECKING:
    from torch import Tensor

NegativeMask = Literal["none", "differing_span"]
TokenStat = Callable[["Tensor", "Tensor"], "Tensor"]
"""One number per token, from the log-probabilities over the vocabulary [M, V] and the token ids [M]; returns [M]."""


@dataclass(frozen=True)
class Scored:
    """Scores of n completions, each [n].

    Attributes:
        sum_logp: log-likelihood under the policy, summed over tokens; carries the gradient.
        n_tokens: number of completion tokens, including the end token.
        reference_sum_logp: log-likelihood under the frozen reference model; ``None`` when no reference is used.
        span_sum_logp, span_reference_sum_logp: the same two sums over the tokens of the differing span only.
        stats: for each of the objective's ``token_stats``, by name: [n] its sum over the completion's tokens.
        token_logp: [n, C] log-probability of each token, right-padded; carries the gradient.
        token_mask: [n, C] True on tokens, False on padding.
        token_span: [n, C] True on the tokens of the differing span.
        reward_margin: r(chosen) - r(rejected) of a reward model, for each negative (``Completion.made``); no gradient.
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
        """[n] ``sum_logp(policy) - sum_logp(reference)`` in nats (the paper's Delta)."""
        assert self.reference_sum_logp is not None, "this objective needs reference log-probabilities"
        return self.sum_logp - self.reference_sum_logp

    def masked_shift(self, mask: NegativeMask) -> Tensor:
        """[n] the shift in nats, summed over all tokens or over the differing span only."""
        if mask == "none":
            return self.shift
        assert self.span_sum_logp is not None
        assert self.span_reference_sum_logp is not None
        return self.span_sum_logp - self.span_reference_sum_logp


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step: all micro-batches of all processes.

    The loss of a micro-batch is a sum over the micro-batch, divided by these counts. The losses of the micro-batches
    therefore add up to the loss of the step. An objective whose loss is not such a sum sets ``looks_ahead`` and uses
    the last two attributes.

    Attributes:
        prompts: number of prompts with at least one negative.
        chosen_tokens, rejected_tokens: number of completion tokens.
        ahead: the values that :meth:`Objective.ahead` returned for all micro-batches of the step; ``None`` if the
            objective does not look ahead, or if this micro-batch is the whole step.
        memory: the values that :meth:`Objective.remember` kept from earlier steps; empty at the first step.
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
        prompt: [P] the index of each negative's prompt, in 0..B-1; a prompt may have several negatives.
        image_side: [P] True for negatives that respond to other images than the chosen response; ``None`` if none does.
        totals: counts of the optimizer step; ``None`` means that this batch is the whole step.
    """

    chosen: Scored
    rejected: Scored
    prompt: Tensor
    totals: StepTotals | None = None
    image_side: Tensor | None = None

    @property
    def chosen_shift(self) -> Tensor:
        """[P] shift of each pair's chosen response, in nats."""
        return self.chosen.shift[self.prompt]

    def _count(self, name: str, own: float) -> float:
        return own if self.totals is None else float(getattr(self.totals, name))

    def mean_over_prompts(self, per_pair: Tensor, among: Tensor | None = None) -> Tensor:
        """Average per-pair values [P] over the pairs of each prompt, then over prompts; returns a scalar.

        Prompts without a pair are not counted.

        Args:
            per_pair: [P] the values.
            among: [P] average over these pairs only; a prompt that has only others counts as 0.
        """
        own = self.prompt if among is None else self.prompt[among]
        values = per_pair if among is None else per_pair[among]
        pairs = own.bincount(minlength=len(self.chosen.sum_logp))
        return (values / pairs[own]).sum() / self._count("prompts", self._paired())

    def mean_over_paired(self, per_prompt: Tensor) -> Tensor:
        """Average values [B] over the prompts that have a pair; returns a scalar."""
        paired = self.prompt.unique()
        return per_prompt[paired].sum() / self._count("prompts", self._paired())

    def _paired(self) -> float:
        return float(len(self.prompt.unique()))

    def chosen_nll(self) -> Tensor:
        """This micro-batch's share of the step's mean NLL of the chosen responses, in nats per token."""
        own = float(self.chosen.n_tokens.sum())
        return -self.chosen.sum_logp.sum() / self._count("chosen_tokens", own)

    def rejected_nll(self) -> Tensor:
        """This micro-batch's share of the step's mean NLL of the negatives, in nats per token."""
        own = float(self.rejected.n_tokens.sum())
        return -self.rejected.sum_logp.sum() / max(self._count("rejected_tokens", own), 1.0)


@dataclass(frozen=True)
class ObjectiveOutput:
    """A loss and the values to log with it.

    Attributes:
        loss: scalar; this micro-batch's share of the step's loss.
        per_pair: detached values [P] by name (``loss/pair``, ``rewards/chosen``, ``cooling/weight``, ...).
        parts: detached scalars by name that add up over micro-batches (``loss/nll``, ``loss/penalty``, ...).
    """

    loss: Tensor
    per_pair: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """What probes and curricula need to know about an objective.

    Attributes:
        floor, tau: of the adaptive cooling weight, in nats per token; ``None`` if the objective has none.
        beta: inverse temperature, per nat; ``None`` if the objective has no preference term.
        weight: the constant weight of negatives if there is no adaptive cooling; 1 is DPO.
    """

    floor: float | None = None
    tau: float | None = None
    beta: float | None = None
    weight: float = 1.0


class Objective(Component):
    """A loss: a pure function from :class:`ScoredPairs` to :class:`ObjectiveOutput`, and its settings.

    Class attributes declare what the objective needs. The rest of the project reads these and never tests for a
    certain class.

    ``needs_negatives``: prompts without a negative are left out of the training data.
    ``uses_negatives``: the loss depends on the negatives; if not, they are not encoded and not scored in training.
    ``needs_reference``: the log-probabilities of the reference model are computed before training.
    ``token_stats``: statistics to compute for every token: names from :data:`cwdpo.scoring.token_stats.TOKEN_STATS`,
    or functions with the same signature. The objective receives them as ``Scored.stats``.
    ``calibrates``: names of the settings that may be ``auto``; :meth:`calibrated` computes them before training.
    """

    needs_negatives: ClassVar[bool] = True
    uses_negatives: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    token_stats: ClassVar[tuple[str | TokenStat, ...]] = ()
    calibrates: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Compute the loss of one micro-batch."""

    def without_margin(self) -> str | None:
        """What is wrong, and to do, if a negative has no ``made.reward_margin``; ``None`` if the loss needs none."""
        return None

    def keeps(self, reference_mean_logp: float) -> bool:
        """Whether to train on a negative, given its mean_logp under the reference model (nats per token)."""
        del reference_mean_logp
        return True

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss depends on the whole optimizer step; see :meth:`ahead`."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether a setting of ``calibrates`` is still ``auto``."""
        return any(getattr(self, name) == "auto" for name in self.calibrates)

    @property
    def calibrates_on_negatives(self) -> bool:
        """Whether :meth:`calibrated` also needs the negatives that the stage trains on."""
        return False

    def calibrated(self, mean_logps: Sequence[float], negatives: Sequence[float] = ()) -> Self:
        """The same objective with its ``auto`` settings replaced by numbers.

        Args:
            mean_logps: mean_logp of samples of the reference model, in nats per token. With
                ``negatives.recalibrate`` this is called again in each round, with samples of the current policy.
            negatives: with ``calibrates_on_negatives``: mean_logp of negatives of the stage under the reference model,
                in nats per token; else empty.
        """
        del mean_logps, negatives
        return self

    def uncertainty(self, intervals: Mapping[str, tuple[float, float]]) -> float:
        """How far the calibrated settings may be off: drawing samples ends when this is at most ``calibration.error``.

        By default the largest distance of a setting from an end of its interval, relative to the setting.

        Args:
            intervals: (low, high) of each setting, which lies between them or near.
        """
        found = [0.0]
        for name, ends in intervals.items():
            value = float(getattr(self, name))
            found.append(max(abs(end - value) for end in ends) / abs(value) if value else inf)
        return max(found)

    def probe_scale(self) -> Scale:
        """The :class:`Scale` of the calibrated objective."""
        return Scale(beta=getattr(self, "beta", None))

    def logged(self) -> Mapping[str, float]:
        """Calibrated settings to log with every row of training metrics, because calibration may change them."""
        return {}

    def ahead(self, pairs: ScoredPairs) -> Sequence[float]:
        """With ``looks_ahead``: the values of a micro-batch that the loss of every micro-batch of the step needs.

        The trainer calls this without gradient for all micro-batches before it computes the first loss of the step,
        and puts the values of all micro-batches and processes into ``totals.ahead``. A step of one micro-batch is not
        scored twice: there ``totals.ahead`` is ``None``, and the objective computes the values from its pairs.
        """
        raise NotImplementedError(f"{type(self).__name__} sets looks_ahead but does not define ahead()")

    def remember(self, memory: tuple[float, ...], ahead: tuple[float, ...]) -> tuple[float, ...]:
        """With ``looks_ahead``: the values to keep for later steps.

        The loss of the next step receives them as ``totals.memory``. They are stored in checkpoints.

        Args:
            memory: the values kept so far.
            ahead: the values of :meth:`ahead` of all micro-batches of this step.
        """
        del memory, ahead
        return ()


@dataclass
class InForce:
    """The objective that a stage trains with now.

    Trainer, probes, rounds and curriculum share one instance, so that all of them see a new calibration.

    Attributes:
        objective: the objective.
        known: how well its calibrated settings are known, to log with every row of training metrics.
    """

    objective: Objective
    known: Mapping[str, float] = field(default_factory=dict)


def negative_log_sigmoid(x: Tensor) -> Tensor:
    """``-log sigmoid(x)`` of values [P], finite with a finite gradient for any x.

    >>> import torch
    >>> negative_log_sigmoid(torch.tensor([0.0, -1000.0])).tolist()
    [0.6931471824645996, 1000.0]
    """
    return x.new_zeros(()).logaddexp(-x)


def rewards(pairs: ScoredPairs, beta: float) -> dict[str, Tensor]:
    """The implicit rewards ``beta * shift`` of chosen and rejected under TRL's names, detached, each [P]."""
    return logged_rewards(beta * pairs.chosen_shift, beta * pairs.rejected.shift)


def logged_rewards(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Rewards of chosen and rejected, each [P], under TRL's names, detached."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }


def pair_output(pairs: ScoredPairs, per_pair: Tensor, beta: float, **also: Tensor) -> ObjectiveOutput:
    """The output of a loss that is a mean over pairs.

    Args:
        pairs: the scored pairs.
        per_pair: [P] the loss of each pair.
        beta: inverse temperature of the logged rewards, per nat.
        also: further values [P] to log, by name.
    """
    loss = pairs.mean_over_prompts(per_pair)
    logged = {"loss/pair": per_pair.detach(), **{k: v.detach() for k, v in also.items()}}
    return ObjectiveOutput(
        loss, per_pair={**logged, **rewards(pairs, beta)}, parts={"loss/preference": loss.detach()}
    )


OBJECTIVES: Registry[Objective] = Registry("objective", "cwdpo.objectives", Objective)
