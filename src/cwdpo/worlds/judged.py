"""The embedded world's exact judge over sampled captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.worlds.shapes import Judgement, Scene, judge


def is_judgeable(example: Example) -> bool:
    """Whether an example is the world's: it carries the scene that its picture shows."""
    return example.extra.get("scene") is not None


def all_judgeable(examples: Sequence[Example]) -> bool:
    """Whether there are examples and all of them are the world's."""
    return bool(examples) and all(map(is_judgeable, examples))


def scene_of(example: Example) -> Scene:
    """The scene that an example carries.

    Raises:
        DataError: it has none: only the embedded world's data can be judged exactly.
    """
    if not is_judgeable(example):
        raise DataError(f"{example.where or example.id}: scene: missing; only the embedded world has a judge")
    scene: Any = example.extra["scene"]
    return Scene.from_json(scene)


def judge_captions(examples: Sequence[Example], captions: Sequence[str]) -> list[Judgement]:
    """Judge each caption against the scene that its example carries.

    Raises:
        DataError: an example has no scene.
    """
    return [judge(text, scene_of(e)) for e, text in zip(examples, captions, strict=True)]


def summary(judged: Sequence[Judgement]) -> dict[str, float]:
    """Shares of all-correct and ill-formed captions, and the mean score."""
    n = len(judged)
    return {
        "all_correct": sum(j.all_correct for j in judged) / n,
        "ill_formed": sum(j.ill_formed for j in judged) / n,
        "score": sum(j.score for j in judged) / n,
    }
