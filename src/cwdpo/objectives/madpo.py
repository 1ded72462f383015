"""MADPO: DPO whose pairs weigh by a reward margin that was estimated first.

Source: Rho, "Margin Adaptive DPO" (arXiv 2510.05342): a reward model gives each pair a margin h; a continuous
weight w(h), fixed during training, amplifies hard pairs (small h) and dampens easy ones (large h).
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.errors import DataError
from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, negative_log_sigmoid, pair_output


class Madpo(Objective):
    """``L = mean -w(h) log sigmoid(beta * (chosen_shift - rejected_shift))``.

    ``w(h) = dampen + (amplify - dampen) * sigmoid((threshold - h) / width)``: the paper's properties (continuous,
    bounded, falling in h) in this project's own form, since only those were at hand here, not its formula.
    h stands in each negative's ``made: {reward_margin: h}``, which ``cwdpo margins`` writes.

    Args:
        beta: inverse temperature, per nat.
        amplify: weight of the hardest pairs.
        dampen: weight of the easiest pairs.
        threshold: h at which the weight is halfway between the two.
        width: of the transition, in the margin's unit.
    """

    beta: float = Field(0.3, gt=0)
    amplify: float = Field(2.0, ge=0)
    dampen: float = Field(0.5, ge=0)
    threshold: float = 1.0
    width: float = Field(0.5, gt=0)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        margin = pairs.rejected.reward_margin
        if margin is None:
            raise DataError(
                "madpo: a negative has no made.reward_margin: write them first, with "
                "`cwdpo margins RUN --data DATA --out FILE`, where RUN was trained with dpo on the same data"
            )
        rise = ((self.threshold - margin) / self.width).sigmoid()
        weight = self.dampen + (self.amplify - self.dampen) * rise
        per_pair = weight * negative_log_sigmoid(self.beta * (pairs.chosen_shift - pairs.rejected.shift))
        return pair_output(pairs, per_pair, self.beta, **{"madpo/weight": weight})
