"""Hinge loss on the margin: pairs with a large enough margin have no gradient.

Source: Zhao et al., "SLiC-HF" (arXiv 2305.10425), with DPO's implicit reward as normalised by Liu et al.,
"Statistical Rejection Sampling Improves Preference Optimization" (arXiv 2309.06657).
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, pair_output


class Hinge(Objective):
    """``L = mean relu(1 - beta * (chosen_shift - rejected_shift))``.

    Args:
        beta: inverse temperature, per nat; from a margin of ``1 / beta`` on, a pair has no loss.
    """

    beta: float = Field(0.3, gt=0)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        margin = pairs.chosen_shift - pairs.rejected.shift
        return pair_output(pairs, (1 - self.beta * margin).clamp_min(0), self.beta)
