"""The embedded world's exact judge."""

from __future__ import annotations

from collections.abc import Sequence

from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example
from cwdpo.worlds.judged import judge_captions


class Exact(ScoringJudge):
    """The response with the higher F1 of stated facts wins."""

    def scores(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """F1 of stated facts, 0 to 1."""
        return [j.score for j in judge_captions(examples, texts)]
