"""Recognises images, videos and audio in a cell by their first bytes, also in base64 or in a data URI."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

_PICTURE_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
)
_OTHER_STARTS = (b"OggS", b"fLaC", b"ID3", b"\x1aE\xdf\xa3")  # Ogg, FLAC, MP3, Matroska and WebM
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_PICTURE_PATH = re.compile(r"\S.{0,1000}\.(jpe?g|png|webp|bmp|gif|tiff?|avif|heic)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\-_\s]+={0,2}\s*")
_FEWEST = 60  # characters: the smallest image in base64 is longer, but few paths are
_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]*/[\w.+-]*)?(;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)


def is_picture(data: bytes) -> bool:
    """Whether bytes start like an encoded image (JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF, HEIC, JPEG 2000)."""
    riff = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    bmp = data[:2] == b"BM" and data[6:10] == bytes(4)
    return (
        data.startswith(_PICTURE_STARTS)
        or riff
        or bmp
        or (data[4:8] == b"ftyp" and data[8:12] in _PICTURE_BRANDS)
    )


def is_media(data: bytes) -> bool:
    """Whether bytes start like an encoded image, video or audio file."""
    return is_picture(data) or data.startswith(_OTHER_STARTS) or data[:4] == b"RIFF" or data[4:8] == b"ftyp"


def from_base64(text: str) -> bytes | None:
    """The image, video or audio in a base64 text; ``None`` for any other text.

    >>> from_base64("a path/to/a/picture.png") is None
    True
    """
    if len(text) < _FEWEST or _BASE64.fullmatch(text) is None:
        return None
    head = _decoded(text.lstrip()[:64])
    return _decoded(text) if head is not None and is_media(head) else None


def from_data_uri(text: str) -> bytes | None:
    """The bytes of ``data:image/png;base64,...``; ``None`` for any other text, also for videos and audio."""
    head = _DATA_URI.match(text[:200])
    if head is None or not (head["type"] or "image/").lower().startswith("image/"):
        return None
    return _decoded(text[head.end() :])


def holds_media(value: Any) -> bool:
    """Whether a cell contains an image, video or audio itself (not a path), or a list of them."""
    if isinstance(value, list | tuple) and value:
        return holds_media(value[0])
    if isinstance(value, bytes):
        return is_media(value)
    if isinstance(value, str):
        if len(value) < _FEWEST and not value.startswith(("data:", "DATA:")):
            return False  # most cells
        return value[:11].lower().startswith(("data:image/", "data:video/", "data:audio/")) or (
            from_base64(value) is not None
        )
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) and is_media(value["bytes"])
    return hasattr(value, "getbands") and hasattr(value, "save")  # a PIL image


def looks_like_a_picture(value: Any) -> bool:
    """Whether a cell contains an image, the path or URL of one, or a list of these."""
    if isinstance(value, list | tuple) and value:
        return looks_like_a_picture(value[0])
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        value = value["path"]
    return holds_media(value) or (isinstance(value, str) and _PICTURE_PATH.fullmatch(value) is not None)


def _decoded(text: str) -> bytes | None:
    """The bytes of a base64 text in either alphabet, padded or not; ``None`` if it is not base64."""
    plain = re.sub(r"\s+", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
