"""LLaMA-Factory's rows: sharegpt, also with OpenAI's names, and alpaca."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cwdpo.data.columns import VIDEO_KEYS, present
from cwdpo.data.formats.base import Format
from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text, split_tags, wrong_type
from cwdpo.data.turns import Text, Turn, answer, checked, place_media, reply_of, sharegpt, with_system
from cwdpo.records import Completion, Example

_TURNS = "a list of {from, value} or of {role, content}"


class LlamaFactory(Format):
    """Sharegpt, sharegpt with OpenAI's names, or alpaca; with ``chosen`` and ``rejected``, or as SFT data.

    Sharegpt: ``conversations[{from, value}]`` (or ``messages[{role, content}]``); an answer is one such turn. Without
    ``chosen`` the last turn is chosen (LLaVA's SFT data). Alpaca: the pairs of ``history``, then ``instruction`` and
    ``input`` joined by a line break; answers are strings. Without ``chosen``, ``output`` is chosen. ``<image>`` in the
    text marks the place of each image of ``images``, ``<video>`` that of each video of ``videos``.
    """

    columns = (
        "conversations",
        "conversations chosen rejected",
        "messages chosen !prompt",
        "messages chosen rejected !prompt",
        "instruction !prompt",
        "instruction chosen rejected !prompt",
    )
    reads = frozenset({"system", "history", *VIDEO_KEYS})
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "images": ["a.png"],
            "conversations": [{"from": "human", "value": "<image>What is it?"}],
            "chosen": {"from": "gpt", "value": "a cat"},
            "rejected": {"from": "gpt", "value": "a dog"},
        },
    )

    def parse(self, row: Row) -> list[Example]:
        """One example a row."""
        media = row.images(), row.videos()
        row.used.add("rejected")
        given = [key for key in ("instruction", "conversations", "messages") if row.has(key)]
        if len(given) > 1:
            raise RowError(
                "two-prompts",
                given[0],
                f"both {given[0]!r} and {given[1]!r} are set; allowed: one",
                "keep one",
            )
        key = given[0] if given else "conversations"
        if key == "instruction":
            turns = [*_history(row), Turn("user", _instruction(row))]
        else:
            _refuse_history(row)
            turns = sharegpt(row, row.take(key, _TURNS), key)
        turns = with_system(row, turns)
        if row.has("chosen"):
            chosen = answer(row, row.take("chosen", "a string or one turn"), "chosen")
        elif key == "instruction":
            chosen = plain_text(
                row.take("output", "'chosen' and 'rejected', or a string in 'output'"), "output"
            )
        else:
            chosen, turns = reply_of(turns, key, turns[:-1]), turns[:-1]
        rejected = []
        if row.has("chosen") or row.has("rejected"):
            text = answer(row, row.take("rejected", "a string or one turn"), "rejected")
            rejected = [("rejected", Completion(text))]
        prompt, (images, videos) = place_media(turns, media, key, in_front=False)
        return [row.example(prompt, images, chosen, rejected, videos=videos)]


def _instruction(row: Row) -> tuple[Text, ...]:
    row.used.add("input")
    texts = [row.take("instruction", "a string"), row.values["input"] if row.has("input") else ""]
    for key, text in zip(("instruction", "input"), texts, strict=True):
        if not isinstance(text, str):
            raise wrong_type(key, text, "a string")
    return checked(split_tags("\n".join(text for text in texts if text)), "instruction")


def _refuse_history(row: Row) -> None:
    """Raise an error for ``history`` in a conversation: LLaMA-Factory reads it in alpaca rows only."""
    if present(row.values.get("history")):
        raise RowError(
            "column-not-read",
            "history",
            "earlier turns beside a conversation; allowed: with 'instruction' only",
            "put them into the conversation",
        )


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
        parts = checked(split_tags(pair[0]), f"history[{i}]")
        turns += [Turn("user", parts), Turn("assistant", (plain_text(pair[1], f"history[{i}]"),))]
    return turns
