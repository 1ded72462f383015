"""Whether the model's confidence in its next token agrees with how often that token is correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from cwdpo.metrics._calibration import calibration
from cwdpo.metrics.base import Answer, Measured, Metric


class TokenEce(Metric):
    """Expected calibration error over the tokens of the chosen responses (Guo et al., arXiv 1706.04599).

    Args:
        bins: number of bins, of equal width.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    bins: int = Field(15, ge=2)

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``token_ece``."""
        pairs = [list(zip(a.top1, a.correct, strict=True)) for a in answers]
        return [calibration("token_ece", answers, pairs, self.bins)]
