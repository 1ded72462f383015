"""The judge of the embedded world, which knows each scene exactly."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example
from cwdpo.worlds.judged import judge_captions, scene_of


class WorldJudge(ScoringJudge):
    """The score is the F1 (0 to 1) of the facts that a response states about its scene; 1 if all facts are right.

    Args:
        threshold: smallest F1 of a right response; by default all facts must be right.
    """

    threshold: float | None = Field(
        1.0,
        ge=0,
        le=1,
        description="smallest F1 of stated facts of a right response; 1: all facts must be right",
    )

    def check(self, examples: Sequence[Example]) -> None:
        """Check that every example has its scene.

        Raises:
            DataError: an example has none.
        """
        for example in examples:
            scene_of(example)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """F1 of the facts that each response states."""
        return [j.score for j in judge_captions(examples, texts)]
