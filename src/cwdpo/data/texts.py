"""Checks texts of a row: they must be valid for a tokenizer and contain no literal image placeholder."""

from __future__ import annotations

import re
from typing import Any

from cwdpo.data.problems import RowError, shown
from cwdpo.records import VIDEO, Place

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
"""The marks for the place of an image and of a video in data of LLaVA, LLaMA-Factory, ms-swift and MMPR."""
_TAGS = {IMAGE_TAG: None, VIDEO_TAG: VIDEO}

# Placeholders of models for an image, video or audio in their input; in a plain text a model would count them as one
# more image.
PLACEHOLDERS = (
    IMAGE_TAG,
    "<|image|>",
    "<|image_pad|>",
    VIDEO_TAG,
    "<|video_pad|>",
    "<|video|>",
    "<|vision_start|>",
    "<start_of_image>",
    "<image_soft_token>",
    "<fake_token_around_image>",
    "<IMG_CONTEXT>",
    "[IMG]",
    "<audio>",
    "<|audio|>",
)
_BEGINS = frozenset(placeholder[0] for placeholder in PLACEHOLDERS)


def placeholder_in(text: str) -> str | None:
    """The first placeholder for an image, video or audio in a text; ``None`` if there is none."""
    if not any(map(text.__contains__, _BEGINS)):  # as most texts
        return None
    return next((p for p in PLACEHOLDERS if p in text), None)


def wrong_type(key: str, value: Any, allowed: str, remedy: str = "") -> RowError:
    """The error for a value of the wrong type; ``allowed`` describes the allowed values."""
    message = f"{type(value).__name__} ({shown(value, 60)}); allowed: {allowed}"
    return RowError("wrong-type", key, message, remedy or f"make it {allowed}")


def plain_text(value: Any, key: str) -> str:
    """``value`` as a string that a tokenizer accepts and that contains no image placeholder.

    Raises:
        RowError: the value is not a string, or contains half of a surrogate pair or a literal placeholder.
    """
    if not isinstance(value, str):
        raise wrong_type(key, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "bad-text", key, "half of a surrogate pair, which UTF-8 does not allow", "repair the encoding"
        ) from None
    placeholder = placeholder_in(value)
    if placeholder is not None:
        raise RowError(
            "placeholder-in-text",
            key,
            f"the text contains a literal {placeholder!r}, which the model would take for an image, video or audio",
            'write the turn as blocks ({"type": "image"}, {"type": "text", "text": ...}), or remove it',
        )
    return value


def text_list(value: Any, key: str) -> list[str]:
    """A list of strings that a tokenizer accepts, see :func:`plain_text`."""
    if not isinstance(value, list):
        raise wrong_type(key, value, "a list of strings")
    return [plain_text(v, f"{key}[{i}]") for i, v in enumerate(value)]


def split_tags(text: str) -> list[str | Place | None]:
    """Split a text at each ``<image>``, which becomes ``None``, and each ``<video>``, which becomes ``VIDEO``.

    Line breaks next to a tag are removed.

    >>> split_tags("<image>\\nWhat is it?")
    [None, 'What is it?']
    """
    if "<" not in text:
        return [text]
    parts: list[str | Place | None] = []
    pieces = re.split(f"({IMAGE_TAG}|{VIDEO_TAG})", text)  # texts and tags in turn
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append(_TAGS[piece])
            continue
        piece = piece.removeprefix("\n") if i else piece
        parts.append(piece.removesuffix("\n") if i < len(pieces) - 1 else piece)
    return [part for part in parts if part != ""] or [""]
