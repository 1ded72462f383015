"""ms-swift's rows: a conversation that ends in chosen, and the rejected response or conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cwdpo.data.columns import VIDEO_KEYS
from cwdpo.data.formats.base import Format
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text
from cwdpo.data.turns import TAGGED_CHAT, place_media, reply_of, turns_of, with_system
from cwdpo.records import Completion, Example


class MsSwift(Format):
    """``messages`` ending in chosen, with ``rejected_response``, ``rejected_messages`` or ``rejected_images``.

    With ``rejected_images`` the rejected side responds to these images; without a text of its own, it is chosen's text.
    Images without an ``<image>`` in the text are put before the first user turn, as in ms-swift; also videos without a
    ``<video>``.
    """

    columns = ("messages rejected_response", "messages rejected_messages", "messages rejected_images")
    reads = frozenset({"system", "rejected_images", *VIDEO_KEYS})
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": "a cat"},
            ],
            "rejected_response": "a dog",
        },
    )

    def parse(self, row: Row) -> list[Example]:
        """One example a row."""
        media = row.images(), row.videos()
        key = "messages"
        turns = turns_of(row, row.take(key, "a conversation"), key, TAGGED_CHAT)
        prompt, chosen = turns[:-1], reply_of(turns, key, turns[:-1])
        row.used |= {"rejected_response", "rejected_messages"}
        if row.has("rejected_messages"):
            key = "rejected_messages"
            other = turns_of(row, row.take(key, "a conversation"), key, TAGGED_CHAT)
            texts = [(key, reply_of(other, key, prompt))]
        elif not row.has("rejected_response") and row.has("rejected_images"):
            texts = []
        else:
            key = "rejected_response"
            value = row.take(key, "a string, or a list of strings")
            values = value if isinstance(value, list) else [value]
            texts = [
                (key if values is not value else f"{key}[{i}]", plain_text(v, key))
                for i, v in enumerate(values)
            ]
        rejected = [(where, Completion(text)) for where, text in texts]
        messages, (images, videos) = place_media(with_system(row, prompt), media, "messages")
        return [row.example(messages, images, chosen, rejected, videos=videos)]
