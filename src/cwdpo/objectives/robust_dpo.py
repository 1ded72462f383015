"""Robust DPO: an unbiased estimate of the loss on clean labels, from labels that are flipped at a known rate.

Source: Chowdhury et al., "Provably Robust DPO: Aligning Language Models with Noisy Feedback"
(arXiv 2403.00409), eq. 12.
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, negative_log_sigmoid, pair_output


class RobustDpo(Objective):
    """``L = mean (-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)``.

    m = chosen_shift - rejected_shift, in nats. The loss has no lower bound: it keeps falling as m grows.

    Args:
        beta: inverse temperature, per nat.
        label_smoothing: e, the probability that a label is flipped; 0 is DPO.
    """

    beta: float = Field(0.3, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        z = self.beta * (pairs.chosen_shift - pairs.rejected.shift)
        e = self.label_smoothing
        clean, flipped = negative_log_sigmoid(z), negative_log_sigmoid(-z)
        return pair_output(pairs, ((1 - e) * clean - e * flipped) / (1 - 2 * e), self.beta)
