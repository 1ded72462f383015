"""Length of the responses."""

from __future__ import annotations

from collections.abc import Sequence

from cwdpo.metrics.base import Answer, Measured, Metric, mean_of


class Length(Metric):
    """Words per response, split at white space."""

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``words``: mean over responses."""
        words = [len(a.text.split()) for a in answers]
        return [
            mean_of("words", answers, words, unit="words", better="none", digits=1, help="words per response")
        ]
