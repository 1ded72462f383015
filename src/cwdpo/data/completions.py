"""Negatives of a row: this project's columns ``negatives`` and ``gentle``, and the scores of some data sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from cwdpo.data.problems import RowError, shown
from cwdpo.data.texts import plain_text, wrong_type
from cwdpo.errors import nearest
from cwdpo.records import Completion, Origin

_COMPLETION_KEYS = ("text", "kind", "origin", "made", "images")
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("chosen_reward", "rejected_reward"),
)  # fmt: skip
_MARGINS = ("margin", "reward_margin")
_SCORED = frozenset((*(key for pair in _SCORES for key in pair), *_MARGINS))


def completion_of(value: Any, key: str) -> Completion:
    """One negative: a string, or ``{text, kind, origin, made, images}``; the caller reads its images."""
    if isinstance(value, str):
        return Completion(plain_text(value, key))
    if not isinstance(value, dict):
        raise wrong_type(key, value, "a string or {text, kind, origin, made, images}")
    unknown = next((k for k in value if k not in _COMPLETION_KEYS), None)
    if unknown is not None:
        raise RowError(
            "unknown-key",
            f"{key}.{unknown}",
            f"unknown key{nearest(unknown, _COMPLETION_KEYS)}; allowed: {', '.join(_COMPLETION_KEYS)}",
            "rename or remove it; put your own notes into 'made'",
        )
    origin: Any = value.get("origin") or "dataset"
    if origin not in get_args(Origin):
        raise RowError(
            "unknown-origin",
            f"{key}.origin",
            f"{shown(origin, 60)}; allowed: {', '.join(get_args(Origin))}",
            "use one of these",
        )
    made = value.get("made") or {}
    if not isinstance(made, dict):
        raise wrong_type(f"{key}.made", made, "an object")
    if made.get("reward_margin") is not None:
        _numbers([made["reward_margin"]], f"{key}.made.reward_margin", 1)
    kind = plain_text(value.get("kind") or "", f"{key}.kind")
    return Completion(plain_text(value.get("text"), f"{key}.text"), origin=origin, kind=kind, made=made)


def margins_of(values: Mapping[str, Any], n: int) -> tuple[frozenset[str], list[float]]:
    """The columns with reward margins, and the margins of a row's ``n`` rejected responses; both may be empty.

    A margin is the score of chosen minus that of rejected (``score_chosen``, ``score_rejected`` and other names), or
    ``margin`` itself, as in TRL's reward trainer. With several rejected responses their scores are a list.

    Raises:
        RowError: there are two sources of margins, only one of two scores, or a value that is not a finite number.
    """
    if not n or _SCORED.isdisjoint(values):  # most rows
        return frozenset(), []
    pairs = [pair for pair in _SCORES if any(values.get(key) is not None for key in pair)]
    single = [key for key in _MARGINS if values.get(key) is not None]
    if not (pairs or single):
        return frozenset(), []
    if len(pairs) + len(single) > 1:
        keys = [*(key for pair in pairs for key in pair), *single]
        raise RowError(
            "two-margins", keys[0], f"{', '.join(keys)} all give a margin of chosen", "keep one of them"
        )
    if single:
        return frozenset(single), _numbers(values[single[0]], single[0], n)
    good, bad = pairs[0]
    for key, other in ((good, bad), (bad, good)):
        if values.get(key) is None:
            raise RowError("missing-key", key, f"{other!r} is set, {key!r} is not", "give both, or neither")
    best = _numbers(values[good], good, 1)[0]
    return frozenset((good, bad)), [best - score for score in _numbers(values[bad], bad, n)]


def with_margin(completion: Completion, margin: float | None) -> Completion:
    """The response with its margin as ``made.reward_margin``, unless it already has one."""
    if margin is None or "reward_margin" in completion.made:
        return completion
    return replace(completion, made={**completion.made, "reward_margin": margin})


def _numbers(value: Any, key: str, n: int) -> list[float]:
    values = value if isinstance(value, list) else [value]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    # An int of 400 digits can be compared, but not become a float.
    if len(values) == n and numbers and all(abs(v) <= sys.float_info.max for v in values):
        return [float(v) for v in values]
    raise wrong_type(key, value, "a finite number" if n == 1 else f"a list of {n} finite numbers")
