"""WPO: DPO with a weight per pair: how likely its two responses are under the current policy.

Source: Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization" (arXiv 2406.11827), eq. 2 and
3 (sampled alignment).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cwdpo.objectives.base import (
    Objective,
    ObjectiveOutput,
    Scored,
    ScoredPairs,
    TokenStat,
    negative_log_sigmoid,
    pair_output,
)

if TYPE_CHECKING:
    from torch import Tensor


def alignment(scored: Scored) -> Tensor:
    """[n] ``exp(mean over tokens of log p(token) - log sum over the vocabulary of p^2)``, without gradient.

    The sum of p^2 is the expected probability of a token sampled from the policy, so a response that the policy
    would sample has a weight of about 1.
    """
    weight: Tensor = ((scored.sum_logp.detach() - scored.stats["collision"]) / scored.n_tokens).exp()
    return weight


class Wpo(Objective):
    """``L = mean -w(chosen) w(rejected) log sigmoid(beta * (chosen_shift - rejected_shift))``, w of :func:`alignment`.

    Args:
        beta: inverse temperature, per nat.
    """

    token_stats: ClassVar[tuple[str | TokenStat, ...]] = ("collision",)

    beta: float = Field(0.3, gt=0)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts; weights carry no gradient."""
        weight = alignment(pairs.chosen)[pairs.prompt] * alignment(pairs.rejected)
        per_pair = weight * negative_log_sigmoid(self.beta * (pairs.chosen_shift - pairs.rejected.shift))
        return pair_output(pairs, per_pair, self.beta, **{"wpo/weight": weight})
