"""Supervised finetuning: maximise the likelihood of the chosen responses; negatives are not used."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.objectives.base import Objective, ObjectiveOutput, ScoredPairs


class Sft(Objective):
    """``L = mean NLL(chosen)``, nats per token over the whole optimizer step."""

    needs_negatives: ClassVar[bool] = False
    uses_negatives: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over [B] chosen responses."""
        nll = pairs.chosen_nll()
        return ObjectiveOutput(nll, parts={"loss/nll": nll.detach()})
