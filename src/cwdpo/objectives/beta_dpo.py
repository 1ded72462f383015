"""beta-DPO: beta grows with the mean margin of the step's pairs, and pairs with an unusual margin are left out.

Source: Wu et al., "beta-DPO: Direct Preference Optimization with Dynamic beta" (arXiv 2407.08639): the
batch's beta (eq. 8), its threshold as a running mean (eq. 9), beta-guided filtering (section 4.2).
"""

from __future__ import annotations

import math

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, negative_log_sigmoid, pair_output

MOMENTUM = 0.9
"""Momentum of the running mean of the margins."""

MIN_BETA = 1e-3
"""Lower limit of beta; without it the linear rule could make beta negative."""

TIE = 1e-3
"""Margins closer than this, in nats, count as equal: a pair scored in another batch differs in its last bits."""


class BetaDpo(Objective):
    """``L = mean over kept pairs of -log sigmoid(b * (chosen_shift - rejected_shift))``.

    ``b = beta * (1 + alpha * (mean M - M0))``. M is ``beta * (chosen_shift - rejected_shift)`` of all pairs of the
    optimizer step, and M0 its running mean over steps (momentum 0.9, starting at 0). The pairs whose M is nearest to
    M0 are kept. The paper draws the kept pairs with a Gaussian density around M0; taking the nearest ones makes the
    loss deterministic.

    Args:
        beta: inverse temperature at M = M0, per nat.
        alpha: how strongly beta depends on the margin; 0 makes it constant.
        keep: share of the step's pairs to keep.
    """

    beta: float = Field(0.3, gt=0)
    alpha: float = Field(0.6, ge=0)
    keep: float = Field(0.8, gt=0, le=1)

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss depends on the whole optimizer step."""
        return True

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts; beta and the choice of pairs carry no gradient."""
        margin = pairs.chosen_shift - pairs.rejected.shift
        own = margin.detach()
        step = own
        usual = 0.0
        if pairs.totals is not None:
            usual = _usual(pairs.totals.memory)
            if pairs.totals.ahead is not None:
                step = own.new_tensor(pairs.totals.ahead)
        beta = max(MIN_BETA, self.beta * (1 + self.alpha * self.beta * (float(step.mean()) - usual)))
        # Keep the share `keep` of the step's pairs that is nearest to the running mean. Dividing by the share that was
        # really kept (ties included) makes the loss a mean over the kept pairs.
        distance = (step - usual).abs().sort().values
        limit = distance[math.ceil(self.keep * len(step)) - 1] + TIE if len(step) else math.inf
        kept = ((own - usual).abs() <= limit).to(margin.dtype)
        share = (distance <= limit).to(margin.dtype).mean()
        per_pair = kept / share * negative_log_sigmoid(beta * margin)
        logged = {"beta_dpo/beta": own.new_full(own.shape, beta), "beta_dpo/kept": kept}
        return pair_output(pairs, per_pair, self.beta, **logged)

    def ahead(self, pairs: ScoredPairs) -> list[float]:
        """``chosen_shift - rejected_shift`` of every pair, in nats."""
        margins: list[float] = (pairs.chosen_shift - pairs.rejected.shift).tolist()
        return margins

    def remember(self, memory: tuple[float, ...], ahead: tuple[float, ...]) -> tuple[float, ...]:
        """The running mean of the steps' margins, in nats."""
        if not ahead:
            return memory
        return (MOMENTUM * _usual(memory) + (1 - MOMENTUM) * sum(ahead) / len(ahead),)


def _usual(memory: tuple[float, ...]) -> float:
    """The running mean before this step, in nats; 0 at the first step, where policy and reference are equal."""
    return memory[0] if memory else 0.0
