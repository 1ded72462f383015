"""VLFeedback: several rated responses of different models to one prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from cwdpo.data.formats.base import Format
from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text, wrong_type
from cwdpo.data.turns import asked, place_images
from cwdpo.records import Completion, Example

_ALLOWED = "a list of {annotations, model, response}"


class VlFeedback(Format):
    """``prompt``, ``img_path`` (or ``image``) and ``completions[{annotations: {aspect: {Rating}}, model, response}]``.

    Chosen is the (first) response with the best mean rating over the aspects that have a rating. Every response with a
    lower mean rating is a negative, with its model and rating in ``made``. Ratings that are not numbers and
    responses without a rating are ignored.
    """

    columns = ("prompt completions",)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "img_path": "a.png",
            "prompt": "What is it?",
            "completions": [
                {"annotations": {"Helpfulness": {"Rating": "5"}}, "model": "m1", "response": "a cat"},
                {"annotations": {"Helpfulness": {"Rating": "2"}}, "model": "m2", "response": "a dog"},
            ],
        },
    )

    def parse(self, row: Row) -> list[Example]:
        """One example a row."""
        images = row.images()
        turn = asked(row, "prompt", len(images))
        rated = [
            r
            for i, one in enumerate(_completions(row))
            if (r := _rated(one, f"completions[{i}]")) is not None
        ]
        if len(rated) < 2:
            raise RowError(
                "no-rating",
                "completions",
                f"{len(rated)} with a rating; allowed: two or more",
                "rate them, or drop the row",
            )
        best = max(rated, key=lambda one: one[0])
        rejected = [
            (key, Completion(text, made={"model": model, "rating": rating}))
            for rating, text, model, key in rated
            if rating < best[0]
        ]
        if not rejected:
            raise RowError(
                "no-preference",
                "completions",
                "all have the same rating; allowed: one that is better",
                "drop the row",
            )
        prompt, placed = place_images([turn], images, "prompt")
        return [row.example(prompt, placed, best[1], rejected)]


def _completions(row: Row) -> list[Any]:
    value = row.take("completions", _ALLOWED)
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        # In a table of such rows there is a column for each key.
        if len({len(one) for one in value.values()}) > 1:
            raise wrong_type("completions", value, f"{_ALLOWED}, or columns of these of equal length")
        value = [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise wrong_type("completions", value, _ALLOWED)
    return value


def _rated(value: Any, key: str) -> tuple[float, str, str, str] | None:
    """Mean rating, response, model and key; ``None`` if there is no rating."""
    if not isinstance(value, dict):
        raise wrong_type(key, value, "{annotations, model, response}")
    annotations = value.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise wrong_type(f"{key}.annotations", annotations, "{aspect: {Rating}}")
    ratings = [_number(a.get("Rating")) for a in annotations.values() if isinstance(a, dict)]
    known = [r for r in ratings if r is not None]
    if not known:
        return None
    text = plain_text(value.get("response"), f"{key}.response")
    return sum(known) / len(known), text, str(value.get("model") or ""), key


def _number(value: Any) -> float | None:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
