"""Conservative DPO: assumes that each label is flipped with a known probability.

Source: Mitchell, "A note on DPO with noisy preferences & relationship to IPO" (2023), eq. 3.
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, negative_log_sigmoid, pair_output


class Cdpo(Objective):
    """``L = mean -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)``, m = chosen_shift - rejected_shift.

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
        return pair_output(pairs, (1 - e) * negative_log_sigmoid(z) + e * negative_log_sigmoid(-z), self.beta)
