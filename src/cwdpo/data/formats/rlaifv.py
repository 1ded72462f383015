"""Rows with a question and two responses: RLAIF-V, RLHF-V, and MMPR (InternVL)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from cwdpo.data.formats.base import Format
from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text, wrong_type
from cwdpo.data.turns import answer, asked, place_images
from cwdpo.records import Completion, Example


class RlaifV(Format):
    """``image``, ``question``, ``chosen``, ``rejected``; in RLHF-V the last three are JSON in ``text``.

    MMPR marks the places of images with ``<image>`` in the question, and several images are a list in ``image``; a row
    may have no image.
    """

    columns = ("question chosen rejected !captions", "image text !captions")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "image": "a.png",
            "question": "What is it?",
            "chosen": "a cat",
            "rejected": "a dog",
        },
    )

    def parse(self, row: Row) -> list[Example]:
        """One example a row."""
        if row.has("text") and not row.has("question"):
            row = replace(row, values={**row.values, **_inner(row)})
            row.used.add("text")
        images = row.images()
        turn = asked(row, "question", len(images))
        chosen = answer(row, row.take("chosen", "a string"), "chosen")
        rejected = answer(row, row.take("rejected", "a string"), "rejected")
        prompt, placed = place_images([turn], images, "question")
        return [row.example(prompt, placed, chosen, [("rejected", Completion(rejected))])]


def _inner(row: Row) -> dict[str, Any]:
    allowed = "a JSON string with question, chosen and rejected"
    text = plain_text(row.take("text", allowed), "text")
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("malformed-json", "text", f"not JSON; allowed: {allowed}", "repair the row") from None
    if not isinstance(inner, dict):
        raise wrong_type("text", inner, allowed)
    return inner
