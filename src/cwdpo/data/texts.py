"""Texts of a row: fit for a tokenizer, and without a literal image placeholder."""

from __future__ import annotations

from typing import Any

from cwdpo.data.problems import RowError, shown

IMAGE_TAG = "<image>"
"""What LLaVA, LLaMA-Factory, ms-swift and MMPR write where a picture stands."""

# What models write into their input where a picture, film or sound belongs; in plain text it would be read as one
# more.
PLACEHOLDERS = (
    IMAGE_TAG,
    "<|image|>",
    "<|image_pad|>",
    "<video>",
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


def placeholder_in(text: str) -> str | None:
    """The first image, film or sound placeholder that a text holds; ``None`` for none."""
    return next((p for p in PLACEHOLDERS if p in text), None)


def wrong_type(key: str, value: Any, allowed: str, remedy: str = "") -> RowError:
    """A value of the wrong type, with what belongs there."""
    message = f"{type(value).__name__} ({shown(value, 60)}); allowed: {allowed}"
    return RowError("wrong-type", key, message, remedy or f"make it {allowed}")


def plain_text(value: Any, key: str) -> str:
    """``value`` as a string that a tokenizer can take and that hides no image.

    Raises:
        RowError: not a string, half a surrogate pair, or a literal image placeholder.
    """
    if not isinstance(value, str):
        raise wrong_type(key, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "bad-text", key, "half of a surrogate pair, which no UTF-8 text can hold", "repair the encoding"
        ) from None
    placeholder = placeholder_in(value)
    if placeholder is not None:
        raise RowError(
            "placeholder-in-text",
            key,
            f"the text holds a literal {placeholder!r}, which the model would read as a picture, film or sound",
            'write the turn as blocks ({"type": "image"}, {"type": "text", "text": ...}), or remove it',
        )
    return value


def text_list(value: Any, key: str) -> list[str]:
    """A list of strings, each fit for a tokenizer."""
    if not isinstance(value, list):
        raise wrong_type(key, value, "a list of strings")
    return [plain_text(v, f"{key}[{i}]") for i, v in enumerate(value)]


def split_tags(text: str) -> list[str | None]:
    """Text cut at each ``<image>``, which becomes ``None``; line breaks next to a tag go with it.

    >>> split_tags("<image>\\nWhat is it?")
    [None, 'What is it?']
    """
    parts: list[str | None] = []
    pieces = text.split(IMAGE_TAG)
    for i, piece in enumerate(pieces):
        if i:
            parts.append(None)
            piece = piece.removeprefix("\n")
        parts.append(piece.removesuffix("\n") if i < len(pieces) - 1 else piece)
    return [part for part in parts if part != ""] or [""]
