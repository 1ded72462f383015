"""Formats of LLaMA-Factory, ms-swift and RLAIF-V / RLHF-V, so that their data is read as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row, plain_text, wrong_type
from cwdpo.data.turns import Turn, place_images, reply_of, turns_of
from cwdpo.records import Completion, Example

_TAG = "<image>"
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def split_tags(text: str) -> list[str | None]:
    """Text cut at each ``<image>``, which becomes ``None``; line breaks next to a tag go with it."""
    parts: list[str | None] = []
    pieces = text.split(_TAG)
    for i, piece in enumerate(pieces):
        if i:
            parts.append(None)
            piece = piece.removeprefix("\n")
        parts.append(piece.removesuffix("\n") if i < len(pieces) - 1 else piece)
    return [part for part in parts if part != ""] or [""]


def _sharegpt(value: Any, key: str) -> list[Turn]:
    """Turns with ``from``/``value``, or with ``role``/``content`` where the data set renames them."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return turns_of(value, key, split=split_tags)
    return turns_of(value, key, fields=("from", "value"), roles=_SHAREGPT_ROLES, split=split_tags)


def parse_llamafactory(row: Row) -> list[Example]:
    """Sharegpt: ``conversations[{from, value}]``, ``chosen``/``rejected`` one ``{from, value}``, ``images``.

    ``<image>`` marks each image in the text. Without ``chosen`` (LLaVA's SFT form) the last turn is chosen.
    """
    images = row.images()
    turns = _sharegpt(row.take("conversations", "a list of {from, value}"), "conversations")
    system = row.has("system") and plain_text(row.take("system", "a string"), "system")
    row.used |= {"system", "rejected"}
    if system:
        turns = [Turn("system", (system,)), *turns]
    rejected = []
    if row.has("chosen"):
        chosen = _answer(row.take("chosen", "{from, value}"), "chosen")
        rejected = [("rejected", Completion(_answer(row.take("rejected", "{from, value}"), "rejected")))]
    else:
        chosen, turns = reply_of(turns, "conversations", turns[:-1]), turns[:-1]
    prompt = place_images(turns, len(images), "conversations", in_front=False)
    return [row.example(prompt, images, chosen, rejected)]


def _answer(value: Any, key: str) -> str:
    if isinstance(value, str):
        return plain_text(value, key)
    if not isinstance(value, dict):
        raise wrong_type(key, value, "a string or one {from, value}")
    return reply_of(_sharegpt([value], key), key, [])


def parse_ms_swift(row: Row) -> list[Example]:
    """``messages`` ending in chosen, with ``rejected_response`` or ``rejected_messages``, and ``images``.

    Images without an ``<image>`` in the text go in front of the first user turn, as ms-swift puts them.
    """
    images = row.images()
    turns = turns_of(row.take("messages", "a conversation"), "messages", split=split_tags)
    prompt, chosen = turns[:-1], reply_of(turns, "messages", turns[:-1])
    row.used |= {"rejected_response", "rejected_messages"}
    if row.has("rejected_messages"):
        key = "rejected_messages"
        other = turns_of(row.take(key, "a conversation"), key, split=split_tags)
        texts = [(key, reply_of(other, key, prompt))]
    else:
        key = "rejected_response"
        value = row.take(key, "a string, or a list of strings")
        values = value if isinstance(value, list) else [value]
        texts = [
            (key if values is not value else f"{key}[{i}]", plain_text(v, key)) for i, v in enumerate(values)
        ]
    rejected = [(where, Completion(text)) for where, text in texts]
    return [row.example(place_images(prompt, len(images), "messages"), images, chosen, rejected)]


def parse_rlaifv(row: Row) -> list[Example]:
    """``image``, ``question``, ``chosen``, ``rejected``; RLHF-V holds the last three as JSON in ``text``."""
    if row.has("text") and not row.has("question"):
        row = replace(row, values={**row.values, **_inner(row)})
        row.used.add("text")
    images = row.images()
    question = plain_text(row.take("question", "a string"), "question")
    chosen = plain_text(row.take("chosen", "a string"), "chosen")
    rejected = plain_text(row.take("rejected", "a string"), "rejected")
    prompt = place_images([Turn("user", (question,))], len(images), "question")
    return [row.example(prompt, images, chosen, [("rejected", Completion(rejected))])]


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
