"""The rows of POVID and V-DPO: LLaVA's conversation, and a second one that ends with rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cwdpo.data.formats.base import Format
from cwdpo.data.rowparts import Row
from cwdpo.data.turns import place_images, reply_of, sharegpt
from cwdpo.records import Completion, Example

_TURNS = "a list of {from, value}"


class Povid(Format):
    """LLaVA's rows (``image``, ``conversations`` ending with chosen) and a second conversation ending with rejected.

    It is called ``rejected_conversations`` in POVID and ``contrastive_conversations`` in V-DPO. ``<image>`` marks the
    place of the image.
    """

    columns = ("conversations rejected_conversations", "conversations contrastive_conversations")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>What is it?"},
                {"from": "gpt", "value": "a cat"},
            ],
            "rejected_conversations": [
                {"from": "human", "value": "<image>What is it?"},
                {"from": "gpt", "value": "a dog"},
            ],
        },
    )

    def parse(self, row: Row) -> list[Example]:
        """One example a row."""
        images = row.images()
        turns = sharegpt(row, row.take("conversations", _TURNS), "conversations")
        prompt, chosen = turns[:-1], reply_of(turns, "conversations", turns[:-1])
        has_contrastive = row.has("contrastive_conversations")
        key = "contrastive_conversations" if has_contrastive else "rejected_conversations"
        other = sharegpt(row, row.take(key, _TURNS), key)
        rejected = [(key, Completion(reply_of(other, key, prompt)))]
        messages, placed = place_images(prompt, images, "conversations", in_front=False)
        return [row.example(messages, placed, chosen, rejected)]
