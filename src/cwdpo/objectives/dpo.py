"""Vanilla DPO, with the optional SFT term of RPO.

Source: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), eq. 7; the SFT term:
Pang et al., "Iterative Reasoning Preference Optimization" (arXiv 2404.19733).
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import (
    NegativeMask,
    Objective,
    ObjectiveOutput,
    ScoredPairs,
    negative_log_sigmoid,
    rewards,
)


class Dpo(Objective):
    """``L = mean -log sigmoid(beta * (chosen_shift - rejected_shift)) + sft_weight * mean NLL(chosen)``.

    The first mean is over the pairs of each prompt and then over prompts; the second is over the chosen tokens.

    Args:
        beta: inverse temperature, per nat.
        sft_weight: weight of the SFT term; 0 leaves it out.
        negative_mask: ``differing_span`` counts only those tokens of the negative that are outside its longest common
            prefix and suffix with chosen (not in the paper).
    """

    beta: float = Field(0.1, gt=0)
    sft_weight: float = Field(0.0, ge=0)
    negative_mask: NegativeMask = "none"

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        margin = pairs.chosen_shift - pairs.rejected.masked_shift(self.negative_mask)
        per_pair = negative_log_sigmoid(self.beta * margin)
        preference = pairs.mean_over_prompts(per_pair)
        nll = pairs.chosen_nll()
        loss = preference + self.sft_weight * nll if self.sft_weight else preference
        return ObjectiveOutput(
            loss,
            per_pair={"loss/pair": per_pair.detach(), **rewards(pairs, self.beta)},
            parts={"loss/preference": preference.detach(), "loss/nll": nll.detach()},
        )
