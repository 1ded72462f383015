"""Judges captions with the scenes of their examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.worlds.shapes import Judgement, Scene, judge


def is_judgeable(example: Example) -> bool:
    """Whether an example is from the embedded world, that is, has the scene of its image."""
    try:
        Scene.from_json(example.extra["scene"])
    except (DataError, KeyError, TypeError, ValueError):  # other data has columns of that name too
        return False
    return True


def all_judgeable(examples: Sequence[Example]) -> bool:
    """Whether there are examples and all of them are from the embedded world."""
    return bool(examples) and all(map(is_judgeable, examples))


def scene_of(example: Example) -> Scene:
    """The scene of an example.

    Raises:
        DataError: the example has none; only data of the embedded world has scenes.
    """
    scene: Any = example.extra.get("scene")
    if not isinstance(scene, Mapping):
        raise DataError(f"{example.where or example.id}: scene: missing; only the embedded world has a judge")
    return Scene.from_json(scene)


def judge_captions(examples: Sequence[Example], captions: Sequence[str]) -> list[Judgement]:
    """Judge each caption with the scene of its example.

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
