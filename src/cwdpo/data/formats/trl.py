"""TRL's formats: preference data with an explicit or an implicit prompt, and SFT data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cwdpo.data.columns import VIDEO_KEYS
from cwdpo.data.formats.base import Format
from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import wrong_type
from cwdpo.data.tools import tools_of
from cwdpo.data.turns import (
    CHAT,
    TAGGED_CHAT,
    Style,
    Turn,
    answer,
    place_media,
    reply_of,
    tags_agree,
    turns_of,
)
from cwdpo.records import Completion, Example

_REPLIES = "a string, a list of messages, or a list of several of these"


class Trl(Format):
    """``images``/``image`` with ``prompt``, ``chosen``, ``rejected`` as strings or message lists.

    Videos are in ``videos``/``video``. Without ``prompt``, chosen and rejected are whole conversations that are equal
    except for the last turn. Rows with ``messages``, or with ``prompt`` and ``completion``, give an example without
    negatives. With ``rejected_images`` the rejected responses are to these images; ``rejected`` may then be missing,
    and stands for chosen's text.
    """

    columns = ("chosen rejected", "prompt chosen", "prompt completion", "messages")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "image": "a.png",
            "prompt": "What is it?",
            "chosen": "a cat",
            "rejected": "a dog",
        },
    )

    reads = frozenset({"tools", "rejected_images", *VIDEO_KEYS})

    def parse(self, row: Row) -> list[Example]:
        """One example a row."""
        media = row.images(), row.videos()
        reply = next((key for key in ("chosen", "completion", "messages") if row.has(key)), "chosen")
        said = row.take(reply, "'chosen', 'completion' or 'messages'")
        key = "prompt" if reply == "completion" or (reply == "chosen" and row.has("prompt")) else reply
        asked = row.take("prompt", "a question") if key == "prompt" else said
        style = TAGGED_CHAT if tags_agree(asked, key, *map(len, media)) else CHAT
        if key == "prompt":
            turns = turns_of(row, asked, key, style)
            chosen = answer(row, said, reply, turns)
        else:
            turns, chosen = _split_conversation(row, said, reply, style)
        rejected = [(where, Completion(text)) for where, text in _rejected(row, turns)]
        prompt, (images, videos) = place_media(turns, media, key)
        return [row.example((*tools_of(row), *prompt), images, chosen, rejected, videos=videos)]


def _split_conversation(row: Row, value: Any, key: str, style: Style) -> tuple[list[Turn], str]:
    if isinstance(value, str):
        raise RowError(
            "missing-key",
            "prompt",
            f"{key!r} is a bare string and there is no 'prompt'; allowed: a string with 'prompt', or a "
            "conversation",
            "add 'prompt'",
        )
    turns = turns_of(row, value, key, style)
    return turns[:-1], reply_of(turns, key, turns[:-1])


def _rejected(row: Row, prompt: Sequence[Turn]) -> list[tuple[str, str]]:
    """``(key, text)`` of each rejected response; may be missing if the row has this project's own columns."""
    has_own = any(key in row.values for key in ("negatives", "gentle", "rejected_images"))
    is_sft = not row.has("chosen")
    row.used.add("rejected")
    if not row.has("rejected") and (has_own or is_sft):
        return []
    value = row.take("rejected", _REPLIES)
    if not isinstance(value, str | dict | list):
        raise wrong_type("rejected", value, _REPLIES)
    if not value:
        return [("rejected", "")]
    if isinstance(value, str | dict) or all(isinstance(v, dict) for v in value):
        return [("rejected", answer(row, value, "rejected", prompt))]
    return [(f"rejected[{i}]", answer(row, v, f"rejected[{i}]", prompt)) for i, v in enumerate(value)]
