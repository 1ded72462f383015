"""DPO-Positive: DPO with a penalty when chosen becomes less likely than under the reference.

Source: Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive"
(arXiv 2402.13228), eq. 3.
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, negative_log_sigmoid, pair_output


class Dpop(Objective):
    """``L = mean -log sigmoid(beta * (chosen_shift - rejected_shift - penalty * relu(-chosen_shift)))``.

    Args:
        beta: inverse temperature, per nat.
        penalty: the paper's lambda; 0 is DPO.
    """

    beta: float = Field(0.3, gt=0)
    penalty: float = Field(5.0, ge=0)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        chosen = pairs.chosen_shift
        margin = chosen - pairs.rejected.shift - self.penalty * (-chosen).clamp_min(0)
        return pair_output(pairs, negative_log_sigmoid(self.beta * margin), self.beta)
