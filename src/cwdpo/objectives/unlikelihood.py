"""Unlikelihood for stage 1: SFT plus a term that lowers the probability of each token of the gentle negatives.

Source: Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319), eq. 4.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs

CERTAIN = -1e-6
"""Upper limit of log p: for p = 1 the term -log(1 - p) would be infinite."""


class Unlikelihood(Objective):
    """``L = mean NLL(chosen) + weight * mean -log(1 - p(token))`` over the tokens of negatives, nats per token.

    By default the term covers the differing span only: the other tokens occur in chosen too, and lowering their
    probability would work against the first term.

    Args:
        weight: weight of the unlikelihood term; 0 is ``sft``.
        shared: also cover the tokens outside the differing span.
    """

    needs_negatives: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    weight: float = Field(0.1, ge=0)
    shared: bool = False

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over [B] chosen responses and [P] gentle negatives."""
        nll = pairs.chosen_nll()
        if len(pairs.rejected.sum_logp) == 0:
            return ObjectiveOutput(nll, parts={"loss/nll": nll.detach()})
        logp = pairs.rejected.token_logp
        mask = pairs.rejected.token_mask if self.shared else pairs.rejected.token_span
        assert logp is not None
        assert mask is not None
        # log(1 - p) = log(-expm1(log p)) loses no precision for small p. Masked positions get a harmless value before
        # the log, since the padding's log p = 0 would give NaN gradients even if the result were masked.
        inside = logp.where(mask, logp.new_full((), -1.0)).clamp_max(CERTAIN)
        penalty = -((-inside.expm1()).log() * mask).sum()
        own = float(pairs.rejected.n_tokens.sum())
        tokens = own if pairs.totals is None else pairs.totals.rejected_tokens
        unlikely = self.weight * penalty / max(tokens, 1.0)
        return ObjectiveOutput(
            nll + unlikely, parts={"loss/nll": nll.detach(), "loss/unlikelihood": unlikely.detach()}
        )
