"""Likeness to the references as a judge."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cwdpo.errors import DataError
from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example


class ReferencesJudge(ScoringJudge):
    """chrF++ of a response against the nearest of references and chosen, 0 to 1.

    Characters up to 6, words up to 2 (Popovic, 2017), by torchmetrics.

    Args:
        threshold: chrF++ from which a response is right; ``None``: as near as chosen, which is 1.
    """

    threshold: float | None = Field(
        0.6, ge=0, le=1, description="chrF++ (0 to 1) from which a response is right"
    )

    def check(self, examples: Sequence[Example]) -> None:
        """Every example must have references.

        Raises:
            DataError: one has none.
        """
        bare = next((e for e in examples if not e.references), None)
        if bare is not None:
            raise DataError(
                f"{bare.where or bare.id}: references: missing; the judge references compares responses with them: "
                "add the column, or choose another judge"
            )

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """chrF++ against the nearest reference."""
        from torchmetrics.functional.text import chrf_score

        return [
            max(float(chrf_score([text], [[known]])) for known in (*example.references, example.chosen.text))
            for example, text in zip(examples, texts, strict=True)
        ]
