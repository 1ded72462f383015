"""The judgements of the embedded world's judge, as metrics."""

from __future__ import annotations

from collections.abc import Sequence

from cwdpo.metrics.base import Answer, Measured, Metric, mean_of
from cwdpo.worlds.judged import judge_captions


class World(Metric):
    """The world judge's results: share of responses right in every fact, F1 of stated facts, share ill-formed."""

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``all_correct``, ``judge_score``, ``ill_formed``, ``hallucinated`` (objects per response)."""
        judged = judge_captions([a.example for a in answers], [a.text for a in answers])

        def mean(name: str, values: list[float], better: str, text: str) -> Measured:
            return mean_of(name, answers, values, better=better, help=text)

        return [
            mean(
                "all_correct",
                [float(j.all_correct) for j in judged],
                "higher",
                "responses right in every fact",
            ),
            mean("judge_score", [j.score for j in judged], "higher", "F1 of stated facts"),
            mean(
                "ill_formed",
                [float(j.ill_formed) for j in judged],
                "lower",
                "responses that are not a sentence",
            ),
            mean(
                "hallucinated", [float(j.hallucinated) for j in judged], "lower", "objects that do not exist"
            ),
        ]
