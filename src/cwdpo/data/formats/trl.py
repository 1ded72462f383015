"""TRL's formats: preference data with an explicit or an implicit prompt, and SFT data."""

from __future__ import annotations

from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row, plain_text, wrong_type
from cwdpo.data.turns import Turn, place_images, reply_of, turns_of
from cwdpo.records import Completion, Example

_REPLIES = "a string, a list of messages, or a list of several of these"


def parse_trl(row: Row) -> list[Example]:
    """``images``/``image`` with ``prompt``, ``chosen``, ``rejected`` as strings or message lists.

    Without ``prompt``, chosen and rejected are whole conversations that share everything but the last turn.
    ``messages``, or ``prompt`` and ``completion``, give an example without negatives.
    """
    images = row.images()
    key = "prompt"
    if row.has("chosen") and row.has("prompt"):
        turns = turns_of(row.take("prompt", "a question"), "prompt")
        chosen = _reply(row.take("chosen", "a response"), "chosen", turns)
    elif row.has("chosen"):
        key = "chosen"
        turns, chosen = _split_conversation(row.take("chosen", "a conversation"), "chosen")
    elif row.has("completion"):
        turns = turns_of(row.take("prompt", "a question"), "prompt")
        chosen = _reply(row.take("completion", "a response"), "completion", turns)
    elif row.has("messages"):
        key = "messages"
        turns, chosen = _split_conversation(row.take("messages", "a conversation"), "messages")
    else:
        row.take("chosen", "'chosen', 'completion' or 'messages'")
        raise AssertionError("unreachable: take refuses an absent key")
    rejected = [(where, Completion(text)) for where, text in _rejected(row, turns)]
    return [row.example(place_images(turns, len(images), key), images, chosen, rejected)]


def _split_conversation(value: Any, key: str) -> tuple[list[Turn], str]:
    if isinstance(value, str):
        raise RowError(
            "missing-key",
            "prompt",
            f"{key!r} is a bare string and there is no 'prompt'; allowed: a string with 'prompt', or a "
            "conversation",
            "add 'prompt'",
        )
    turns = turns_of(value, key)
    return turns[:-1], reply_of(turns, key, turns[:-1])


def _reply(value: Any, key: str, prompt: list[Turn]) -> str:
    return plain_text(value, key) if isinstance(value, str) else reply_of(turns_of(value, key), key, prompt)


def _rejected(row: Row, prompt: list[Turn]) -> list[tuple[str, str]]:
    """``(key, text)`` of each rejected response. Our own columns may stand in for it."""
    has_own = any(key in row.values for key in ("negatives", "gentle"))
    is_sft = not row.has("chosen")
    row.used.add("rejected")
    if not row.has("rejected") and (has_own or is_sft):
        return []
    value = row.take("rejected", _REPLIES)
    if not isinstance(value, str | list):
        raise wrong_type("rejected", value, _REPLIES)
    if not value:
        return [("rejected", "")]
    if isinstance(value, str) or all(isinstance(v, dict) for v in value):
        return [("rejected", _reply(value, "rejected", prompt))]
    return [(f"rejected[{i}]", _reply(v, f"rejected[{i}]", prompt)) for i, v in enumerate(value)]
