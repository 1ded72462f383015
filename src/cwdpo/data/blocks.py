"""The content of a turn: a text, or blocks of texts, images and videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.data.columns import present
from cwdpo.data.problems import RowError, shown
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text, wrong_type
from cwdpo.records import VIDEO, ImageRef, Place, VideoRef

Part = str | ImageRef | VideoRef | Place | None
"""A text, an image or a video given in its block, or the place of the next one of the row: ``None`` for an image,
``VIDEO`` for a video."""
Text = str | Place | None
"""A part of a text: a text, or a place that it marks."""

_PICTURE_KEYS = ("image", "url", "path", "base64", "bytes", "data")
_VIDEO_KEYS = ("video", "url", "path", "bytes")
_BLOCK_SETTINGS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_HARMLESS = ("type", "cache_control", "detail", "index", "id")
_BLOCKS = {
    "text": ("text",),
    "image": (*_PICTURE_KEYS, "image_url"),
    "image_url": (*_PICTURE_KEYS, "image_url"),
    "video": _VIDEO_KEYS,
}
_READ = {kind: frozenset((*keys, *_HARMLESS)) for kind, keys in _BLOCKS.items()}


@dataclass(frozen=True)
class Style:
    """How a data set writes turns: the keys of role and content, and its names of the roles.

    ``split`` splits a text into texts and places of images and videos, if the text marks them.
    """

    role: str = "role"
    content: str = "content"
    roles: tuple[tuple[str, str], ...] = (
        ("system", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "tool"),
    )  # fmt: skip
    split: Callable[[str], Sequence[Text]] | None = None


def texts_of(value: Any, key: str, style: Style) -> tuple[Text, ...]:
    """The parts of a text, split where the style says so."""
    if style.split is None or not isinstance(value, str):
        return (plain_text(value, key),)
    return checked(style.split(value), key)


def checked(parts: Sequence[Text], key: str) -> tuple[Text, ...]:
    """The parts of a text, whose texts are plain (:func:`cwdpo.data.texts.plain_text`)."""
    return tuple(plain_text(part, key) if isinstance(part, str) else part for part in parts)


def block_parts(row: Row, block: Any, key: str, style: Style) -> tuple[Part, ...]:
    """The parts of a content block: texts, or one image or video."""
    if not isinstance(block, dict):
        raise wrong_type(key, block, 'a block such as {"type": "text", "text": ...}')
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in _BLOCKS:
        raise RowError(
            "unknown-block",
            f"{key}.type",
            f"{shown(kind, 60)}; allowed: {', '.join(_BLOCKS)}",
            "sound and tools are not read: leave such rows out",
        )
    for name, value in block.items():
        if name not in _READ[kind] and present(value):
            remedy = "set model.processor_options instead" if name in _BLOCK_SETTINGS else "remove the key"
            if kind == "video":
                remedy = "remove the key; fps, max_frames and max_pixels of all videos are set in data.video"
            raise RowError(
                "unknown-key", f"{key}.{name}", f"a block of type {kind!r} is read without it", remedy
            )
    if kind == "text":
        return texts_of(block.get("text"), f"{key}.text", style)
    if kind == "video":
        given = _carried(block, key, _VIDEO_KEYS)
        return (VIDEO if given is None else row.take_video(block[given], f"{key}.{given}"),)
    return (_picture(row, block, key),)


def _carried(block: Mapping[str, Any], key: str, names: Sequence[str]) -> str | None:
    """The one key of a block that names its image or video; ``None`` if none does."""
    carried = [name for name in names if present(block.get(name))]
    if len(carried) > 1:
        raise RowError(
            f"two-{block['type'].removesuffix('_url')}-keys",
            f"{key}.{carried[0]}",
            f"{' and '.join(carried)} are both set",
            "keep one",
        )
    return carried[0] if carried else None


def _picture(row: Row, block: Mapping[str, Any], key: str) -> ImageRef | None:
    """The image given in a block, or ``None`` for a block without one, the place of an image of ``images``."""
    name = _carried(block, key, (*_PICTURE_KEYS, "image_url"))
    if name is None:
        if block["type"] == "image_url":
            raise RowError("missing-key", f"{key}.image_url", "the block names no picture", "give it one")
        return None
    value, where = block[name], f"{key}.{name}"
    if name == "image_url" and isinstance(value, dict):
        value, where = value.get("url"), f"{where}.url"
    return row.take_image(value, where)
