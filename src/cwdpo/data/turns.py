"""Conversations: the turns in a row, the response at their end, and the places of images and videos in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cwdpo.data.blocks import Part as Part
from cwdpo.data.blocks import Style as Style
from cwdpo.data.blocks import Text as Text
from cwdpo.data.blocks import block_parts, texts_of
from cwdpo.data.blocks import checked as checked
from cwdpo.data.columns import present
from cwdpo.data.problems import RowError, shown
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import IMAGE_TAG, VIDEO_TAG, plain_text, split_tags, wrong_type
from cwdpo.data.tools import more_of
from cwdpo.records import VIDEO, ImageRef, Message, Place, VideoRef

_DROPPED = "leave such rows out"
# Keys of a turn that change its meaning, and what to do instead. Other keys have no effect on a template.
_TURN_MEANING = {
    "reasoning_content": "write the reasoning into the content, in the form that your template has for it",
    "reasoning": "write the reasoning into the content, in the form that your template has for it",
    "thinking": "write the reasoning into the content, in the form that your template has for it",
    "images": "put the row's pictures into the column 'images', and mark each place",
    "videos": "put the row's videos into the column 'videos', and mark each place",
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
CHAT = Style()
TAGGED_CHAT = Style(split=split_tags)
SHAREGPT = Style(
    "from", "value", (("system", "system"), ("human", "user"), ("gpt", "assistant")), split=split_tags
)


@dataclass(frozen=True)
class Turn:
    """A turn before images and videos are placed; ``plain``: its content was a string without a marked place.

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
            blocks = [block_parts(row, block, f"{where}[{j}]", style) for j, block in enumerate(content)]
            turns.append(Turn(roles[role], tuple(part for parts in blocks for part in parts), False, more))
        else:
            parts = texts_of(content, where, style)
            turns.append(Turn(roles[role], parts, all(isinstance(part, str) for part in parts), more))
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


def asked(row: Row, key: str, n_images: int) -> Turn:
    """A question given as a string in the column ``key``; see :func:`tags_agree` for ``<image>`` tags in it.

    Raises:
        RowError: the value is not a text, or the numbers of tags and images differ.
    """
    text = row.take(key, "a string")
    style = TAGGED_CHAT if tags_agree(text, key, n_images) else CHAT
    return (
        turns_of(row, text, key, style)[0]
        if isinstance(text, str)
        else Turn("user", (plain_text(text, key),))
    )


def tags_agree(value: Any, key: str, n_images: int, n_videos: int = 0) -> bool:
    """Whether the texts of a prompt mark the places of its images with ``<image>``, of its videos with ``<video>``.

    Raises:
        RowError: the prompt has tags and the row has images (videos), but their numbers differ.
    """
    agree, texts = [], list(_texts(value))
    for tag, medium, there in ((IMAGE_TAG, "image", n_images), (VIDEO_TAG, "video", n_videos)):
        n = sum(text.count(tag) for text in texts)
        if n and there and n != there:
            raise RowError(
                f"{medium}-count",
                key,
                f"the text marks {n} places with {tag!r}, the row has {there} {medium}s; allowed: equal numbers",
                f"write one tag for each {medium}, or none, or give one {medium} for each tag",
            )
        if n:
            agree.append(n == there)
    return bool(agree) and all(agree)


def _texts(value: Any) -> Iterator[str]:
    """All texts of a prompt."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        yield from _texts(value.get("content"))
        if value.get("type") == "text":
            yield from _texts(value.get("text"))


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
        RowError: the turns do not start with the prompt, end in another role, or the response contains an image or
            a video.
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
            "image-in-response",
            key,
            "the response holds an image or a video; allowed: text only",
            "remove it",
        )
    return "\n".join(texts)


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns with the column ``system`` as the first turn, unless they already start with a system turn."""
    row.used.add("system")
    text = plain_text(row.take("system", "a string"), "system") if row.has("system") else ""
    return turns if not text or (turns and turns[0].role == "system") else [Turn("system", (text,)), *turns]


Media = tuple[tuple[ImageRef, ...], tuple[VideoRef, ...]]
"""The images and the videos of a row, or of a prompt in the order of their places."""


def place_images(
    turns: Sequence[Turn], images: Sequence[ImageRef], key: str, *, in_front: bool = True
) -> tuple[tuple[Message, ...], tuple[ImageRef, ...]]:
    """:func:`place_media` for rows without videos.

    Raises:
        RowError: see there.
    """
    messages, (placed, _) = place_media(turns, (tuple(images), ()), key, in_front=in_front)
    return messages, placed


def place_media(
    turns: Sequence[Turn], media: Media, key: str, *, in_front: bool = True
) -> tuple[tuple[Message, ...], Media]:
    """The messages of the prompt, and its images and videos in the order of their places.

    If no place is marked and the first user turn was a string, images, then videos, are put before its text
    (``in_front``). Empty text parts are left out.

    Args:
        turns: the turns of the prompt. A place is ``None`` or ``VIDEO`` for the next of ``media``, or an image or video
            given there.
        media: the images and videos of the row's columns.
        key: the column of the prompt, for messages.
        in_front: whether images and videos without a marked place may be put before the text.

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
    images, videos = media
    places = _places(placed)
    first = next(i for i, turn in enumerate(placed) if turn.role == "user")
    if not places and in_front and placed[first].plain:
        places = [*[None] * len(images), *[VIDEO] * len(videos)]
        placed[first] = replace(placed[first], parts=(*places, *placed[first].parts))
    for medium, marked, there in (
        ("image", places.count(None), len(images)),
        ("video", places.count(VIDEO), len(videos)),
    ):
        if marked != there:
            raise RowError(
                f"{medium}-count",
                key,
                f"the prompt marks {marked} {medium} places, the row has {there} {medium}s; allowed: equal numbers",
                f"mark one place for each {medium}, or give one {medium} for each place",
            )
    messages = tuple(Message(t.role, tuple(_part(p) for p in t.parts if _said(p)), t.more) for t in placed)
    if not messages[-1].parts:
        raise RowError("empty-prompt", key, "the last user turn is empty", "fill it or drop the row")
    next_image, next_video = iter(images), iter(videos)
    found = [next(next_image) if p is None else next(next_video) if p is VIDEO else p for p in places]
    return messages, (
        tuple(one for one in found if isinstance(one, ImageRef)),
        tuple(one for one in found if isinstance(one, VideoRef)),
    )


def _places(turns: Sequence[Turn]) -> list[ImageRef | VideoRef | Place | None]:
    return [part for turn in turns for part in turn.parts if not isinstance(part, str)]


def _part(part: Part) -> Text:
    """A part as messages have it: an image or a video that is given there is a place."""
    if isinstance(part, VideoRef):
        return VIDEO
    return None if isinstance(part, ImageRef) else part


def _said(part: Part) -> bool:
    return not isinstance(part, str) or bool(part.strip())
