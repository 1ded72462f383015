"""Uni-DPO: DPO with a weight per pair for the quality of its data, and one for how far the policy has learned it.

Source: Peng et al., "Uni-DPO: A Unified Paradigm for Dynamic Preference Optimization of LLMs" (arXiv 2506.10054), and
its official code for vision-language models. All log-probabilities are means over tokens there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cwdpo.errors import DataError
from cwdpo.objectives.base import (
    Objective,
    ObjectiveOutput,
    ScoredPairs,
    logged_rewards,
    negative_log_sigmoid,
)

if TYPE_CHECKING:
    from torch import Tensor


class UniDpo(Objective):
    """``L = mean -w_quality w_performance log sigmoid(m) + nll_weight * [chosen_shift < 0] * NLL(chosen)``.

    ``m = beta * (chosen_shift - rejected_shift)`` with shifts per token, ``w_quality = sigmoid(eta * h)`` with the
    difference h of the two responses' scores, and ``w_performance = sigmoid(tau - beta * (mean_logp(chosen) -
    mean_logp(rejected)))^gamma``, which falls as the policy separates the pair and carries a gradient. h is each
    negative's ``made: {reward_margin: h}``; the columns ``score_chosen`` and ``score_rejected`` give it.

    The official code leaves out the NLL of chosen responses whose own score is below a limit. That limit is a matter
    of the data's scale and is not here: leave out such rows.

    Args:
        beta: scale of the reward, per nat per token.
        eta: scale of the difference of scores; 0 gives every pair ``w_quality`` 0.5 and needs no scores.
        tau: target margin of the policy alone, in rewards.
        gamma: exponent of ``w_performance``; 0 turns it off.
        nll_weight: lambda, of the NLL of chosen responses that have become less likely than under the reference.
    """

    beta: float = Field(2.0, gt=0)
    eta: float = Field(0.7, ge=0)
    tau: float = 2.0
    gamma: float = Field(3.0, ge=0)
    nll_weight: float = Field(0.001, ge=0)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts.

        Raises:
            DataError: a negative has no reward margin, and ``eta`` is not 0.
        """
        chosen, rejected = pairs.chosen, pairs.rejected
        chosen_shift = (chosen.shift / chosen.n_tokens)[pairs.prompt]
        rejected_shift = rejected.shift / rejected.n_tokens
        alone = self.beta * (chosen.mean_logp[pairs.prompt] - rejected.mean_logp)
        performance = (self.tau - alone).sigmoid() ** self.gamma
        quality = self._quality(pairs)
        per_pair = quality * performance * negative_log_sigmoid(self.beta * (chosen_shift - rejected_shift))
        fallen = (chosen_shift.detach() < 0).to(per_pair.dtype)
        nll = -self.nll_weight * fallen * chosen.mean_logp[pairs.prompt]
        loss = pairs.mean_over_prompts(per_pair + nll)
        return ObjectiveOutput(
            loss,
            per_pair={
                "loss/pair": (per_pair + nll).detach(),
                "uni_dpo/quality": quality.detach(),
                "uni_dpo/performance": performance.detach(),
                **logged_rewards(self.beta * chosen_shift, self.beta * rejected_shift),
            },
            parts={"loss/preference": pairs.mean_over_prompts(per_pair).detach()},
        )

    def without_margin(self) -> str | None:
        """What to do; ``None`` with ``eta`` 0."""
        return (
            None
            if self.eta == 0
            else (
                "uni_dpo: a negative has no made.reward_margin: give the columns score_chosen and score_rejected, or "
                "set eta: 0, which gives all pairs the same quality"
            )
        )

    def _quality(self, pairs: ScoredPairs) -> Tensor:
        """[P] the weight of each pair's difference of scores."""
        h = pairs.rejected.reward_margin
        if self.eta == 0:
            return pairs.rejected.sum_logp.detach().new_full(pairs.rejected.sum_logp.shape, 0.5)
        if h is None:
            raise DataError(self.without_margin() or "")
        return (self.eta * h).sigmoid().to(pairs.rejected.sum_logp.dtype)
