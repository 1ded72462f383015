"""Conversations: turns out of a row, the reply at their end, and the places of the images in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.data.rowparts import plain_text, wrong_type
from cwdpo.records import Message

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """A turn before images are placed; ``plain`` when its content was a bare string."""

    role: str
    parts: tuple[str | None, ...]
    plain: bool = True


def turns_of(
    value: Any,
    key: str,
    *,
    fields: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = ROLES,
    split: Callable[[str], Sequence[str | None]] | None = None,
) -> list[Turn]:
    """Turns from a bare string (one user turn) or from a list of messages.

    ``fields`` name the keys of role and content, ``roles`` maps the roles in use to ours, and ``split`` cuts
    a bare string into text and images (``None``) for formats that mark images inside the text.
    """
    if isinstance(value, str):
        value = [{fields[0]: next(k for k, v in roles.items() if v == "user"), fields[1]: value}]
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise wrong_type(key, value, f"a string or a list of {{{fields[0]}, {fields[1]}}}")
    turns = []
    for i, message in enumerate(value):
        where = f"{key}[{i}]"
        role = message.get(fields[0])
        if not isinstance(role, str) or role not in roles:
            raise RowError(
                "wrong-role",
                f"{where}.{fields[0]}",
                f"{str(role)[:60]!r}; allowed: {', '.join(roles)}",
                "rename the role, or drop the row",
            )
        content, where = message.get(fields[1]), f"{where}.{fields[1]}"
        if isinstance(content, list):
            turns.append(
                Turn(roles[role], tuple(_block(b, f"{where}[{j}]") for j, b in enumerate(content)), False)
            )
        elif split is not None and isinstance(content, str):
            parts = tuple(p if p is None else plain_text(p, where) for p in split(content))
            turns.append(Turn(roles[role], parts, None not in parts))
        else:
            turns.append(Turn(roles[role], (plain_text(content, where),)))
    return turns


def _block(block: Any, key: str) -> str | None:
    if not isinstance(block, dict):
        raise wrong_type(key, block, 'a block such as {"type": "text", "text": ...}')
    if block.get("type") == "text":
        return plain_text(block.get("text"), f"{key}.text")
    if block.get("type") != "image":
        raise RowError(
            "unknown-block",
            f"{key}.type",
            f"{str(block.get('type'))[:60]!r}; allowed: text, image",
            "leave other media out",
        )
    carried = next((k for k in ("image", "url", "path", "base64") if block.get(k) is not None), None)
    if carried is not None:
        raise RowError(
            "image-in-block",
            f"{key}.{carried}",
            "the block carries its own picture; allowed: a bare {'type': 'image'}",
            "move the pictures, in order, to the row's 'images'",
        )
    return None


def reply_of(turns: Sequence[Turn], key: str, prompt: Sequence[Turn]) -> str:
    """The text of the one assistant turn after ``prompt``, which the turns may repeat or leave out.

    Raises:
        RowError: the turns do not begin with the prompt, end in another role, or the reply holds an image.
    """
    before = list(turns[:-1])
    if before and before != list(prompt):
        raise RowError(
            "prefix-differs",
            key,
            f"{len(turns)} turns that do not begin with the prompt; allowed: its turns and one reply",
            "give one assistant turn, or exactly the prompt's turns before it",
        )
    if not turns or turns[-1].role != "assistant":
        raise RowError(
            "wrong-role", key, "does not end in an assistant turn; allowed: one", "end it in the response"
        )
    texts = [part for part in turns[-1].parts if part is not None]
    if len(texts) < len(turns[-1].parts):
        raise RowError(
            "image-in-response", key, "the response holds an image; allowed: text only", "remove it"
        )
    return "\n".join(texts)


def place_images(
    turns: Sequence[Turn], n_images: int, key: str, *, in_front: bool = True
) -> tuple[Message, ...]:
    """The prompt, with as many image places as there are images.

    A first user turn given as a bare string gets the images in front of its text when nothing marks their
    place (``in_front``). Empty text parts are left out.

    Raises:
        RowError: the counts differ, the prompt is empty, or it does not end in a user turn.
    """
    if not turns or turns[-1].role != "user":
        raise RowError(
            "wrong-role",
            key,
            "the prompt does not end in a user turn; allowed: one",
            "end it in the question",
        )
    placed = list(turns)
    marked = sum(turn.parts.count(None) for turn in placed)
    first = next(i for i, turn in enumerate(placed) if turn.role == "user")
    if marked == 0 and n_images and in_front and placed[first].plain:
        placed[first] = Turn("user", (None,) * n_images + placed[first].parts)
        marked = n_images
    if marked != n_images:
        raise RowError(
            "image-count",
            key,
            f"the prompt marks {marked} image places, the row has {n_images} images; allowed: equal numbers",
            "mark one place for each image, or give one image for each place",
        )
    messages = tuple(Message(t.role, tuple(p for p in t.parts if p is None or p.strip())) for t in placed)
    if not messages[-1].parts:
        raise RowError("empty-prompt", key, "the last user turn is empty", "fill it or drop the row")
    return messages
