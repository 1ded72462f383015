"""Stage 1 as the paper's abstract describes it: smoothed supervision on gentle negatives with a small weight.

Source: "Learning Dynamics of VLM Finetuning" (arXiv 2510.11978 v1, abstract):
``L = mean NLL(chosen) + w * CE(negative tokens, label-smoothed targets)``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs, TokenStat


class SftSmoothed(Objective):
    """``L = mean NLL(chosen) + weight * CE(negative, smoothed)``, nats per token.

    ``CE = (1 - smoothing) * NLL(negative) + smoothing * mean over the vocabulary of -log p``.

    Args:
        weight: w. Small: the literature uses 0.05 to 0.2; in our measurements 0.03 did the least harm.
        smoothing: share of the target probability that is spread over the vocabulary (usual: 0.1 to 0.3).
    """

    needs_negatives: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    token_stats: ClassVar[tuple[str | TokenStat, ...]] = ("uniform",)

    weight: float = Field(0.03, ge=0)
    smoothing: float = Field(0.2, ge=0, le=1)

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over [B] chosen responses and [P] gentle negatives."""
        nll = pairs.chosen_nll()
        if len(pairs.rejected.sum_logp) == 0:
            return ObjectiveOutput(nll, parts={"loss/nll": nll.detach()})
        own = float(pairs.rejected.n_tokens.sum())
        tokens = own if pairs.totals is None else pairs.totals.rejected_tokens
        uniform = -pairs.rejected.stats["uniform"].sum() / max(tokens, 1.0)
        negative = pairs.rejected_nll()
        smoothed = self.weight * ((1 - self.smoothing) * negative + self.smoothing * uniform)
        return ObjectiveOutput(
            nll + smoothed,
            parts={
                "loss/nll": nll.detach(),
                "loss/smoothed": smoothed.detach(),
                "loss/negative_nll": negative.detach(),
            },
        )
