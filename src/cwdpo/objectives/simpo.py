"""SimPO: compares the log-likelihood per token of chosen and rejected, with a target margin and no reference.

Source: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward" (arXiv 2405.14734), eq. 6.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cwdpo.objectives.base import (
    Objective,
    ObjectiveOutput,
    ScoredPairs,
    logged_rewards,
    negative_log_sigmoid,
)


class Simpo(Objective):
    """``L = mean -log sigmoid(beta * (mean_logp(chosen) - mean_logp(rejected)) - gamma)``, nats per token.

    The logged rewards are ``beta * mean_logp``, since there is no reference.

    Args:
        beta: scale of the reward, per nat per token.
        gamma: target margin of the rewards.
    """

    needs_reference: ClassVar[bool] = False

    beta: float = Field(2.0, gt=0)
    gamma: float = Field(1.0, ge=0)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        chosen = self.beta * pairs.chosen.mean_logp[pairs.prompt]
        rejected = self.beta * pairs.rejected.mean_logp
        per_pair = negative_log_sigmoid(chosen - rejected - self.gamma)
        loss = pairs.mean_over_prompts(per_pair)
        return ObjectiveOutput(
            loss,
            per_pair={
                "loss/pair": per_pair.detach(),
                **logged_rewards(chosen, rejected),
            },
            parts={"loss/preference": loss.detach()},
        )
