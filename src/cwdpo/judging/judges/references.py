"""A judge that compares a response with the references."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cwdpo.errors import DataError
from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example


class ReferencesJudge(ScoringJudge):
    """The score is the largest chrF++ (0 to 1) of a response with a reference or the chosen response.

    Character n-grams up to 6, word n-grams up to 2 (Popovic, 2017), with sacrebleu.

    Args:
        threshold: smallest chrF++ of a right response; ``None``: that of the chosen response, which is 1.
    """

    threshold: float | None = Field(
        0.6, ge=0, le=1, description="smallest chrF++ (0 to 1) of a right response"
    )

    def check(self, examples: Sequence[Example]) -> None:
        """Check that every example has references.

        Raises:
            DataError: an example has none.
        """
        bare = next((e for e in examples if not e.references), None)
        if bare is not None:
            raise DataError(
                f"{bare.where or bare.id}: references: missing; the judge references compares responses with them: "
                "add the column, or choose another judge"
            )

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """The largest chrF++ of each response with a reference or the chosen response."""
        from sacrebleu.metrics import CHRF

        chrf = CHRF(word_order=2)
        return [  # of several references, chrF++ takes the one with the best score
            chrf.sentence_score(text, [*example.references, example.chosen.text]).score / 100
            for example, text in zip(examples, texts, strict=True)
        ]
