"""MADPO: DPO with a weight per pair that depends on the reward margin of a reward model.

Source: Rho, "Margin Adaptive DPO" (arXiv 2510.05342) and its official code. With this weight the stationary point is
``beta m = c(h) h``, where m is the policy's margin and h the reward model's.
"""

from __future__ import annotations

import math

from pydantic import Field

from cwdpo.errors import DataError
from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, negative_log_sigmoid, pair_output

TAU = math.log(999)
"""The default of the official code: the margin at which sigmoid(h) is 0.999."""


class Madpo(Objective):
    """``L = mean -w(h) log sigmoid(beta * (chosen_shift - rejected_shift))``.

    ``w(h) = sigmoid(c(h) h) / sigmoid(h)`` for ``h > -tau``, else 1, with
    ``c(h) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * exp(rate * (|h| - tau)))``. Small margins are
    amplified by up to ``c_max``, pairs whose label the reward model contradicts (h < 0) get a smaller weight, and far
    from 0 the weight is 1. h is each negative's ``made: {reward_margin: h}``; the command ``cwdpo margins`` writes it.

    Args:
        beta: inverse temperature, per nat.
        c_max: amplification of the reward margin near h = 0.
        c_min: amplification far from h = 0; ``None`` means ``1 / c_max``.
        rate: lambda, how fast c changes from ``c_max`` to ``c_min``.
        tau: the |h| at which c is 1.
    """

    beta: float = Field(0.1, gt=0)
    c_max: float = Field(2.0, gt=1)
    c_min: float | None = Field(None, gt=0, lt=1)
    rate: float = Field(1.0, gt=0)
    tau: float = Field(TAU, gt=0)

    def without_margin(self) -> str:
        """What to do."""
        return (
            "madpo: a negative has no made.reward_margin: write the margins first, with `cwdpo margins RUN --data DATA "
            "--out FILE`, where RUN was trained with dpo on the same data"
        )

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts.

        Raises:
            DataError: a negative has no reward margin.
        """
        h = pairs.rejected.reward_margin
        if h is None:
            raise DataError(self.without_margin())
        low = 1 / self.c_max if self.c_min is None else self.c_min
        turn = (self.c_max - 1) / (1 - low) * (self.rate * (h.abs() - self.tau)).exp()
        c = low + (self.c_max - low) / (1 + turn)
        # Divide the sigmoids as a difference of logarithms: for h far below 0 both round to 0.
        ratio = (negative_log_sigmoid(h) - negative_log_sigmoid(c * h)).exp()
        weight = ratio.where(h > -self.tau, ratio.new_ones(()))
        per_pair = weight * negative_log_sigmoid(self.beta * (pairs.chosen_shift - pairs.rejected.shift))
        return pair_output(pairs, per_pair, self.beta, **{"madpo/weight": weight})
