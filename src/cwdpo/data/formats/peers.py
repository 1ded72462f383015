"""Formats of LLaMA-Factory, ms-swift, RLAIF-V / RLHF-V and POVID, so that their data is read as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row, plain_text, wrong_type
from cwdpo.data.turns import Turn, place_images, reply_of, turns_of
from cwdpo.records import Completion, Example

_TAG = "<image>"
_TURNS = "a list of {from, value} or of {role, content}"
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
    """Sharegpt, its OpenAI spelling, or alpaca; each with ``chosen`` and ``rejected``, or as SFT data without.

    Sharegpt: ``conversations[{from, value}]`` (or ``messages[{role, content}]``), answers as one such turn each; the
    last turn is chosen where there is no ``chosen`` (LLaVA's SFT form). Alpaca: ``instruction`` and ``input``, joined
    by a line break, behind the pairs of ``history``; answers are strings; ``output`` is chosen where there is no
    ``chosen``. ``<image>`` marks each picture of ``images`` in the text.
    """
    images = row.images()
    row.used |= {"system", "rejected"}
    given = [key for key in ("instruction", "conversations", "messages") if row.has(key)]
    if len(given) > 1:
        raise RowError(
            "two-prompts", given[0], f"both {given[0]!r} and {given[1]!r} are set; allowed: one", "keep one"
        )
    key = given[0] if given else "conversations"
    if key == "instruction":
        turns = [*_history(row), Turn("user", _instruction(row))]
    else:
        turns = _sharegpt(row.take(key, _TURNS), key)
    if row.has("system") and (system := plain_text(row.take("system", "a string"), "system")):
        turns = turns if turns and turns[0].role == "system" else [Turn("system", (system,)), *turns]
    if row.has("chosen"):
        chosen = _answer(row.take("chosen", "a string or one turn"), "chosen")
    elif key == "instruction":
        chosen = plain_text(row.take("output", "'chosen' and 'rejected', or a string in 'output'"), "output")
    else:
        chosen, turns = reply_of(turns, key, turns[:-1]), turns[:-1]
    rejected = []
    if row.has("chosen") or row.has("rejected"):
        text = _answer(row.take("rejected", "a string or one turn"), "rejected")
        rejected = [("rejected", Completion(text))]
    prompt = place_images(turns, len(images), key, in_front=False)
    return [row.example(prompt, images, chosen, rejected)]


def _instruction(row: Row) -> tuple[str | None, ...]:
    row.used.add("input")
    texts = [row.take("instruction", "a string"), row.values["input"] if row.has("input") else ""]
    for key, text in zip(("instruction", "input"), texts, strict=True):
        if not isinstance(text, str):
            raise wrong_type(key, text, "a string")
    parts = split_tags("\n".join(text for text in texts if text))
    return tuple(part if part is None else plain_text(part, "instruction") for part in parts)


def _history(row: Row) -> list[Turn]:
    """Earlier questions and answers, as pairs of strings."""
    pairs = row.values["history"] if row.has("history") else []
    row.used.add("history")
    if not isinstance(pairs, list):
        raise wrong_type("history", pairs, "a list of [question, answer]")
    turns = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise wrong_type(f"history[{i}]", pair, "[question, answer], two strings")
        parts = [p if p is None else plain_text(p, f"history[{i}]") for p in split_tags(pair[0])]
        turns += [Turn("user", tuple(parts)), Turn("assistant", (plain_text(pair[1], f"history[{i}]"),))]
    return turns


def _answer(value: Any, key: str) -> str:
    if isinstance(value, str):
        return plain_text(value, key)
    if not isinstance(value, dict):
        raise wrong_type(key, value, "a string, or one turn: {from, value} or {role, content}")
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


def parse_povid(row: Row) -> list[Example]:
    """LLaVA's rows (``image``, ``conversations`` ending in chosen) with a second conversation that ends in rejected.

    POVID calls it ``rejected_conversations``, V-DPO ``contrastive_conversations``. ``<image>`` marks the picture.
    """
    images = row.images()
    turns = _sharegpt(row.take("conversations", "a list of {from, value}"), "conversations")
    prompt, chosen = turns[:-1], reply_of(turns, "conversations", turns[:-1])
    key = "contrastive_conversations" if row.has("contrastive_conversations") else "rejected_conversations"
    other = _sharegpt(row.take(key, "a list of {from, value}"), key)
    rejected = [(key, Completion(reply_of(other, key, prompt)))]
    placed = place_images(prompt, len(images), "conversations", in_front=False)
    return [row.example(placed, images, chosen, rejected)]


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
