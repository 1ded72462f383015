"""The embedded world's exact judge over sampled captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.worlds.shapes import Judgement, Scene, judge


def judge_captions(examples: Sequence[Example], captions: Sequence[str]) -> list[Judgement]:
    """Judge each caption against the scene that its example carries.

    Raises:
        DataError: an example has no scene: only the embedded world's data can be judged exactly.
    """
    judged = []
    for example, text in zip(examples, captions, strict=True):
        scene: Any = example.extra.get("scene")
        if scene is None:
            raise DataError(
                f"{example.where or example.id}: scene: missing; only the embedded world has a judge"
            )
        judged.append(judge(text, Scene.from_json(scene)))
    return judged


def summary(judged: Sequence[Judgement]) -> dict[str, float]:
    """Shares of all-correct and ill-formed captions, and the mean score."""
    n = len(judged)
    return {
        "all_correct": sum(j.all_correct for j in judged) / n,
        "ill_formed": sum(j.ill_formed for j in judged) / n,
        "score": sum(j.score for j in judged) / n,
    }
