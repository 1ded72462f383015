"""MPO: a weighted sum of a preference, a quality and a generation loss, as InternVL is trained on MMPR.

Source: Wang et al., "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference
Optimization" (arXiv 2411.10442), eq. 1 to 6; its quality loss is BCO (Jung et al., arXiv 2404.04656).
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import (
    Objective,
    ObjectiveOutput,
    ScoredPairs,
    negative_log_sigmoid,
    rewards,
)


class Mpo(Objective):
    """``L = preference_weight L_p + quality_weight L_q + generation_weight L_g``.

    ``L_p = mean -log sigmoid(beta (chosen_shift - rejected_shift))`` (DPO),
    ``L_q = mean -log sigmoid(beta chosen_shift - delta) - log sigmoid(-(beta rejected_shift - delta))`` (BCO: each
    response is compared with a running reward shift), ``L_g = NLL(chosen)`` in nats per token. ``delta`` is the mean
    reward of a step, averaged over all steps up to and including this one; it carries no gradient.

    Args:
        beta: inverse temperature, per nat.
        preference_weight, quality_weight, generation_weight: the paper's w_p, w_q, w_g.
        reward_shift: ``False`` sets delta to 0, as TRL 1.16 does (``loss_type="bco_pair"``).
    """

    beta: float = Field(0.1, gt=0)
    preference_weight: float = Field(0.8, ge=0)
    quality_weight: float = Field(0.2, ge=0)
    generation_weight: float = Field(1.0, ge=0)
    reward_shift: bool = True

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss depends on the whole optimizer step: the reward shift does."""
        return self.reward_shift

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        chosen, rejected = self.beta * pairs.chosen_shift, self.beta * pairs.rejected.shift
        delta = self._delta(pairs)
        preference = negative_log_sigmoid(chosen - rejected)
        quality = negative_log_sigmoid(chosen - delta) + negative_log_sigmoid(delta - rejected)
        per_pair = self.preference_weight * preference + self.quality_weight * quality
        nll = pairs.chosen_nll()
        loss = pairs.mean_over_prompts(per_pair) + self.generation_weight * nll
        return ObjectiveOutput(
            loss,
            per_pair={
                "loss/pair": per_pair.detach(),
                "loss/quality": quality.detach(),
                "mpo/reward_shift": chosen.detach().new_full(chosen.shape, delta),
                **rewards(pairs, self.beta),
            },
            parts={"loss/nll": nll.detach()},
        )

    def _delta(self, pairs: ScoredPairs) -> float:
        if not self.reward_shift:
            return 0.0
        totals = pairs.totals
        step = self.ahead(pairs) if totals is None or totals.ahead is None else totals.ahead
        memory = self.remember(() if totals is None else totals.memory, tuple(step))
        return memory[0] if memory else 0.0

    def ahead(self, pairs: ScoredPairs) -> list[float]:
        """The rewards ``beta * shift`` of chosen and rejected of every pair."""
        both: list[float] = [
            *(self.beta * pairs.chosen_shift.detach()).tolist(),
            *(self.beta * pairs.rejected.shift.detach()).tolist(),
        ]
        return both

    def remember(self, memory: tuple[float, ...], ahead: tuple[float, ...]) -> tuple[float, ...]:
        """``(mean over steps of the mean reward, number of steps)``."""
        if not ahead:
            return memory
        mean, steps = memory or (0.0, 0.0)
        return (mean * steps + sum(ahead) / len(ahead)) / (steps + 1), steps + 1
