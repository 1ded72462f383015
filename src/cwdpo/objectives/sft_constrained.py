"""Stage 1 as the paper's equations define it: SFT with a constraint on the NLL of gentle negatives.

Source: "Learning Dynamics of VLM Finetuning" (arXiv 2510.11978), stage 1:
minimise E[NLL(chosen)] subject to E[NLL(negative)] >= C, relaxed to
``L = mean NLL(chosen) + lambda * relu(C - mean NLL(negative))``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs


class SftConstrained(Objective):
    """``L = mean NLL(chosen) + lambda * relu(C - mean NLL(negative))``, NLL in nats per token.

    Both means are over the whole optimizer step. The penalty is active for all micro-batches of a step or for none:
    it is active while the mean NLL of the step's negatives is below C.

    Args:
        penalty: lambda; 0 is the ``sft`` objective.
        constraint: C, in nats per token.
        slack: ``False`` is the paper's "hard constraint" ablation: the penalty ``lambda * (C - NLL)`` stays active
            when the constraint is met.
    """

    needs_negatives: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    penalty: float = Field(0.1, ge=0)
    constraint: float = Field(0.8, gt=0)
    slack: bool = True

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss depends on the whole optimizer step."""
        return True

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over [B] chosen responses and [P] gentle negatives."""
        nll = pairs.chosen_nll()
        if len(pairs.rejected.sum_logp) == 0:
            return ObjectiveOutput(nll, parts={"loss/nll": nll.detach()})
        negative = pairs.rejected_nll()
        totals = pairs.totals
        # `negative` is this micro-batch's share of the step's mean NLL, so C is divided among the micro-batches too,
        # by their share of the step's tokens.
        tokens = float(pairs.rejected.n_tokens.sum())
        share = 1.0 if totals is None else tokens / max(totals.rejected_tokens, 1.0)
        if totals is None or totals.ahead is None:
            assert share == 1.0, "totals.ahead is missing for a step of several micro-batches"
            whole = float(negative.detach())
        else:
            whole = sum(totals.ahead) / max(totals.rejected_tokens, 1.0)
        active = not self.slack or whole < self.constraint
        penalty = self.penalty * float(active) * (self.constraint * share - negative)
        return ObjectiveOutput(
            nll + penalty,
            parts={
                "loss/nll": nll.detach(),
                "loss/penalty": penalty.detach(),
                "loss/negative_nll": negative.detach(),
            },
        )

    def ahead(self, pairs: ScoredPairs) -> list[float]:
        """NLL of the micro-batch's negatives, in nats, summed over tokens."""
        return [-float(pairs.rejected.sum_logp.sum())]
