"""IPO: regression of the margin to a finite target, so that the margin does not grow without limit.

Source: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences"
(arXiv 2310.12036), eq. 17, with tau = beta.
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, pair_output


class Ipo(Objective):
    """``L = mean (h - 1 / (2 beta))^2`` with ``h = chosen_shift / n_chosen - rejected_shift / n_rejected``.

    Args:
        beta: the paper's tau, per nat; the target margin is ``1 / (2 beta)``.
        per_token: divide each shift by its number of tokens, as TRL does (the paper's authors confirmed this to TRL);
            ``False`` uses sums, as the equation is written.
    """

    beta: float = Field(0.3, gt=0)
    per_token: bool = True

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        chosen, rejected = pairs.chosen_shift, pairs.rejected.shift
        if self.per_token:
            chosen = chosen / pairs.chosen.n_tokens[pairs.prompt]
            rejected = rejected / pairs.rejected.n_tokens
        return pair_output(pairs, (chosen - rejected - 1 / (2 * self.beta)) ** 2, self.beta)
