"""The embedded world's exact judge."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example
from cwdpo.worlds.judged import judge_captions, scene_of


class WorldJudge(ScoringJudge):
    """F1 of the facts that a response states about its scene, 0 to 1; it is 1 exactly when all facts are right.

    Args:
        threshold: F1 from which a response is right; the default asks for all facts.
    """

    threshold: float | None = Field(
        1.0,
        ge=0,
        le=1,
        description="F1 of stated facts from which a response is right; 1: all facts are right",
    )

    def check(self, examples: Sequence[Example]) -> None:
        """Every example must carry its scene.

        Raises:
            DataError: one has none.
        """
        for example in examples:
            scene_of(example)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """F1 of stated facts."""
        return [j.score for j in judge_captions(examples, texts)]
