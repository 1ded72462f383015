"""Conversations: the turns in a row, the response at their end, and the places of images in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cwdpo.data.columns import present
from cwdpo.data.problems import RowError, shown
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import IMAGE_TAG, plain_text, split_tags, wrong_type
from cwdpo.data.tools import more_of
from cwdpo.records import ImageRef, Message

Part = str | ImageRef | None
"""A text, an image given in its block, or ``None``: the place of the next image of ``images``."""

_DROPPED = "leave such rows out"
# Keys of a turn that change its meaning, and what to do instead. Other keys have no effect on a template.
_TURN_MEANING = {
    "reasoning_content": "write the reasoning into the content, in the form that your template has for it",
    "reasoning": "write the reasoning into the content, in the form that your template has for it",
    "thinking": "write the reasoning into the content, in the form that your template has for it",
    "images": "put the row's pictures into the column 'images', and mark each place",
    "videos": f"films are not read: {_DROPPED}",
    "audio": f"sound is not read: {_DROPPED}",
    "weight": "turns are not weighted: only the response is trained; remove the key",
    "loss": "only the response is trained, and whole: remove the key",
    "train": "only the response is trained, and whole: remove the key",
    "prefix": "write the whole response: the start of one is not read separately",
    "refusal": "write the refusal into the content",
}
_TOOLS = (
    "write calls as 'tool_calls' of an assistant turn, and what the tool gave as a turn of the role 'tool'"
)
_ROLES = {
    **dict.fromkeys(("function", "observation", "function_call", "ipython", "tool_response"), _TOOLS),
    "developer": "call it system, if it says how to answer",
    "human": "call it user", "gpt": "call it assistant", "bot": "call it assistant", "model": "call it assistant",
}  # fmt: skip
"""Roles of other tools -> what to do about them."""
_PICTURE_KEYS = ("image", "url", "path", "base64", "bytes", "data")
_BLOCK_SETTINGS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_HARMLESS = ("type", "cache_control", "detail", "index", "id")
_BLOCKS = {
    "text": ("text",),
    "image": (*_PICTURE_KEYS, "image_url"),
    "image_url": (*_PICTURE_KEYS, "image_url"),
}


@dataclass(frozen=True)
class Style:
    """How a data set writes turns: the keys of role and content, and its names of the roles.

    ``split`` splits a text into texts and places of images (``None``), if the text marks them.
    """

    role: str = "role"
    content: str = "content"
    roles: tuple[tuple[str, str], ...] = (
        ("system", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "tool"),
    )  # fmt: skip
    split: Callable[[str], Sequence[str | None]] | None = None


CHAT = Style()
TAGGED_CHAT = Style(split=split_tags)
SHAREGPT = Style(
    "from", "value", (("system", "system"), ("human", "user"), ("gpt", "assistant")), split=split_tags
)


@dataclass(frozen=True)
class Turn:
    """A turn before images are placed; ``plain``: its content was a string without a marked place.

    ``more``: what it has beside its content, see :class:`cwdpo.records.Message`.
    """

    role: str
    parts: tuple[Part, ...]
    plain: bool = True
    more: str = ""


def turns_of(row: Row, value: Any, key: str, style: Style = CHAT) -> list[Turn]:
    """The turns of a string (one user turn) or of a list of messages.

    Raises:
        RowError: there are no turns, or one has an unknown role or block, a key that changes its meaning, or an image
            that cannot be used.
    """
    roles = dict(style.roles)
    if isinstance(value, str):
        user = next(name for name, ours in roles.items() if ours == "user")
        value = [{style.role: user, style.content: value}]
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise wrong_type(key, value, f"a string or a list of {{{style.role}, {style.content}}}")
    turns = []
    for i, message in enumerate(value):
        where = f"{key}[{i}]"
        role = message.get(style.role)
        if not isinstance(role, str) or role not in roles:
            raise RowError(
                "wrong-role",
                f"{where}.{style.role}",
                f"{shown(role, 60)}; allowed: {', '.join(roles)}",
                _ROLES.get(str(role), "rename the role, or drop the row"),
            )
        _refuse_unread(message, where)
        more = more_of(message, roles[role], where)
        content, where = message.get(style.content), f"{where}.{style.content}"
        if content is None and more:  # a call says nothing beside
            content = ""
        if isinstance(content, list):
            blocks = [_block(row, block, f"{where}[{j}]", style) for j, block in enumerate(content)]
            turns.append(Turn(roles[role], tuple(part for parts in blocks for part in parts), False, more))
        else:
            parts = _texts(content, where, style)
            turns.append(Turn(roles[role], parts, None not in parts, more))
    return turns


def sharegpt(row: Row, value: Any, key: str) -> list[Turn]:
    """Turns with ``from``/``value``, or with ``role``/``content`` if the data set uses these names."""
    renamed = isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
    return turns_of(row, value, key, TAGGED_CHAT if renamed else SHAREGPT)


def _refuse_unread(message: Mapping[str, Any], where: str) -> None:
    for name in sorted(message.keys() & _TURN_MEANING.keys()):
        value, remedy = message[name], _TURN_MEANING[name]
        # Tables write False, 0 or 1 for "no special value", but 0 is a special value of loss and weight.
        usual = value in (True, 1) if name in ("weight", "loss", "train") else value is False
        if present(value) and not usual:
            raise RowError(
                "turn-not-read",
                f"{where}.{name}",
                f"{shown(value, 60)}: a key that changes what the turn means and is not read",
                remedy,
            )


def _texts(value: Any, key: str, style: Style) -> tuple[str | None, ...]:
    if style.split is None or not isinstance(value, str):
        return (plain_text(value, key),)
    return tuple(part if part is None else plain_text(part, key) for part in style.split(value))


def _block(row: Row, block: Any, key: str, style: Style) -> tuple[Part, ...]:
    """The parts of a content block: texts, or one image."""
    if not isinstance(block, dict):
        raise wrong_type(key, block, 'a block such as {"type": "text", "text": ...}')
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in _BLOCKS:
        raise RowError(
            "unknown-block",
            f"{key}.type",
            f"{shown(kind, 60)}; allowed: {', '.join(_BLOCKS)}",
            "films, sound and tools are not read: leave such rows out",
        )
    for name, value in block.items():
        if present(value) and name not in (*_BLOCKS[kind], *_HARMLESS):
            remedy = "set model.processor_options instead" if name in _BLOCK_SETTINGS else "remove the key"
            raise RowError(
                "unknown-key", f"{key}.{name}", f"a block of type {kind!r} is read without it", remedy
            )
    if kind == "text":
        return _texts(block.get("text"), f"{key}.text", style)
    return (_picture(row, block, key),)


def _picture(row: Row, block: Mapping[str, Any], key: str) -> ImageRef | None:
    """The image given in a block, or ``None`` for a block without one, the place of an image of ``images``."""
    carried = [name for name in (*_PICTURE_KEYS, "image_url") if present(block.get(name))]
    if len(carried) > 1:
        raise RowError(
            "two-image-keys", f"{key}.{carried[0]}", f"{' and '.join(carried)} are both set", "keep one"
        )
    if not carried:
        if block["type"] == "image_url":
            raise RowError("missing-key", f"{key}.image_url", "the block names no picture", "give it one")
        return None
    name = carried[0]
    value, where = block[name], f"{key}.{name}"
    if name == "image_url" and isinstance(value, dict):
        value, where = value.get("url"), f"{where}.url"
    return row.take_image(value, where)


def asked(row: Row, key: str, n_images: int) -> Turn:
    """A question given as a string in the column ``key``; see :func:`tags_agree` for ``<image>`` tags in it.

    Raises:
        RowError: the value is not a text, or the numbers of tags and images differ.
    """
    text = row.take(key, "a string")
    style = TAGGED_CHAT if tags_agree(text, n_images, key) else CHAT
    return (
        turns_of(row, text, key, style)[0]
        if isinstance(text, str)
        else Turn("user", (plain_text(text, key),))
    )


def tags_agree(value: Any, n_images: int, key: str) -> bool:
    """Whether the texts of a prompt mark the places of its images with ``<image>``.

    Raises:
        RowError: the prompt has tags and the row has images, but their numbers differ.
    """
    n = _tags(value)
    if n and n_images and n != n_images:
        raise RowError(
            "image-count",
            key,
            f"the text marks {n} places with {IMAGE_TAG!r}, the row has {n_images} images; allowed: equal numbers",
            "write one tag for each image, or none, or give one image for each tag",
        )
    return n > 0 and n == n_images


def _tags(value: Any) -> int:
    if isinstance(value, str):
        return value.count(IMAGE_TAG)
    if isinstance(value, list):
        return sum(_tags(one) for one in value)
    if isinstance(value, dict):
        return _tags(value.get("content")) + _tags(value.get("text") if value.get("type") == "text" else None)
    return 0


def answer(row: Row, value: Any, key: str, prompt: Sequence[Turn] = ()) -> str:
    """A response given as a string, as one turn, or as a list of turns that ends with it.

    Turns are ``{role, content}`` or ``{from, value}``; a list may repeat the turns of the prompt before the response.
    """
    if isinstance(value, str):
        return plain_text(value, key)
    allowed = "a string, one turn ({role, content} or {from, value}), or a list of turns"
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise wrong_type(key, value, allowed)
    return reply_of(sharegpt(row, turns, key), key, prompt)


def reply_of(turns: Sequence[Turn], key: str, prompt: Sequence[Turn]) -> str:
    """The text of the assistant turn after ``prompt``, whose turns may be repeated or left out.

    Raises:
        RowError: the turns do not start with the prompt, end in another role, or the response contains an image.
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
    if turns[-1].more:
        raise RowError(
            "call-in-response",
            key,
            "the response calls a tool; what is trained is a text",
            "write the call into its content, in the form that your template has for it",
        )
    texts = [part for part in turns[-1].parts if isinstance(part, str)]
    if len(texts) < len(turns[-1].parts):
        raise RowError(
            "image-in-response", key, "the response holds an image; allowed: text only", "remove it"
        )
    return "\n".join(texts)


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns with the column ``system`` as the first turn, unless they already start with a system turn."""
    row.used.add("system")
    text = plain_text(row.take("system", "a string"), "system") if row.has("system") else ""
    return turns if not text or (turns and turns[0].role == "system") else [Turn("system", (text,)), *turns]


def place_images(
    turns: Sequence[Turn], images: Sequence[ImageRef], key: str, *, in_front: bool = True
) -> tuple[tuple[Message, ...], tuple[ImageRef, ...]]:
    """The messages of the prompt, and its images in the order of their places.

    If no place is marked and the first user turn was a string, the images are put before its text (``in_front``).
    Empty text parts are left out.

    Args:
        turns: the turns of the prompt. A place is ``None`` for the next of ``images``, or an image given there.
        images: the images of the row's image column.
        key: the column of the prompt, for messages.
        in_front: whether images without a marked place may be put before the text.

    Raises:
        RowError: the counts differ, the prompt is empty, or it does not end in a user turn.
    """
    if not turns or turns[-1].role not in ("user", "tool"):
        raise RowError(
            "wrong-role",
            key,
            "the prompt does not end in a user turn; allowed: one, or a turn of a tool",
            "end it in the question",
        )
    if not any(turn.role == "user" for turn in turns):
        raise RowError(
            "wrong-role", key, "the prompt has no user turn; allowed: one or more", "add the question"
        )
    placed = list(turns)
    places = [part for turn in placed for part in turn.parts if not isinstance(part, str)]
    first = next(i for i, turn in enumerate(placed) if turn.role == "user")
    if not places and images and in_front and placed[first].plain:
        places = [None] * len(images)
        placed[first] = replace(placed[first], parts=(*places, *placed[first].parts))
    marked = places.count(None)
    if marked != len(images):
        raise RowError(
            "image-count",
            key,
            f"the prompt marks {marked} image places, the row has {len(images)} images; allowed: equal numbers",
            "mark one place for each image, or give one image for each place",
        )
    messages = tuple(
        Message(
            t.role,
            tuple(p if isinstance(p, str) else None for p in t.parts if p is None or (p != "" and _said(p))),
            t.more,
        )
        for t in placed
    )
    if not messages[-1].parts:
        raise RowError("empty-prompt", key, "the last user turn is empty", "fill it or drop the row")
    waiting = iter(images)
    return messages, tuple(next(waiting) if place is None else place for place in places)


def _said(part: Part) -> bool:
    return not isinstance(part, str) or bool(part.strip())
