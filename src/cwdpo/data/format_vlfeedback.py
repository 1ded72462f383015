"""VLFeedback: several rated responses of different models to one prompt."""

from __future__ import annotations

from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row, plain_text, wrong_type
from cwdpo.data.turns import Turn, place_images
from cwdpo.records import Completion, Example

_ALLOWED = "a list of {annotations, model, response}"


def parse_vlfeedback(row: Row) -> list[Example]:
    """``prompt``, ``img_path`` (or ``image``) and ``completions[{annotations: {aspect: {Rating}}, model, response}]``.

    Chosen is the response with the best mean rating over all aspects, the first of several; every response with a lower
    one is a negative, the model that wrote it and its rating in ``made``. Ratings that are no number do not count.
    """
    images = row.images()
    question = plain_text(row.take("prompt", "a string"), "prompt")
    rated = [_rated(one, f"completions[{i}]") for i, one in enumerate(_completions(row))]
    known = [r for r in rated if r[0] is not None]
    best = max((r for r, *_ in known if r is not None), default=None)
    if best is None:
        raise RowError("no-rating", "completions", "no response has a rating", "rate them, or drop the row")
    chosen = next(text for rating, text, _ in known if rating == best)
    rejected = [
        (f"completions[{i}]", Completion(text, made={"model": model, "rating": rating}))
        for i, (rating, text, model) in enumerate(rated)
        if rating is not None and rating < best
    ]
    if not rejected:
        raise RowError("no-preference", "completions", "all responses are rated alike", "drop the row")
    prompt = place_images([Turn("user", (question,))], len(images), "prompt")
    return [row.example(prompt, images, chosen, rejected)]


def _completions(row: Row) -> list[Any]:
    value = row.take("completions", _ALLOWED)
    if isinstance(value, dict):  # a table of such rows holds a column for each key
        columns = {key: list(values) for key, values in value.items() if isinstance(values, list)}
        value = [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise wrong_type("completions", value, _ALLOWED)
    return value


def _rated(value: Any, key: str) -> tuple[float | None, str, str]:
    """Mean rating (``None`` without one), response, model."""
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), dict):
        raise wrong_type(key, value, "{annotations, model, response}")
    text = plain_text(value.get("response"), f"{key}.response")
    ratings = [_number(a.get("Rating")) for a in value["annotations"].values() if isinstance(a, dict)]
    known = [r for r in ratings if r is not None]
    return sum(known) / len(known) if known else None, text, str(value.get("model") or "")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
