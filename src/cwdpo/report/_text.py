"""Prepares text, numbers and images for a page."""

from __future__ import annotations

import base64
import io
import math
import os
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.errors import CwdpoError
from cwdpo.records import ImageEdit, ImageRef, VideoRef, VideoSampling
from cwdpo.videos import decoded

if TYPE_CHECKING:
    from PIL.Image import Image

MISSING = "not recorded"
MAX_TEXT = 3000
"""Number of characters of a text that are shown."""
MAX_PIXELS = 256
"""Longest side of an embedded image."""
_STRIP = VideoSampling(fps=1000, max_frames=4, max_pixels=160 * 160)
"""Frames of an embedded video: four from all of it, if it has as many."""

_HARMLESS = frozenset("\n\t\u00ad\u200c\u200d")  # soft hyphen and joiners occur in ordinary text
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def visible(text: str) -> str:
    """The text with control, bidi, private and surrogate characters written as ``⟨U+202E⟩``.

    >>> visible("a" + chr(0x202E) + "b")
    'a⟨U+202E⟩b'
    """
    if text.isascii() and text.isprintable():
        return text
    shown = (
        f"⟨U+{ord(c):04X}⟩" if c not in _HARMLESS and unicodedata.category(c) in _HIDDEN else c for c in text
    )
    return "".join(shown)


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """The text, cut after ``limit`` characters, with the number of characters that are left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"


def finite(value: Any) -> float | None:
    """The value as a finite number; ``None`` for anything else, including booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int | None = 3) -> str:
    """A number with ``digits`` decimals (``None``: four significant digits); "not recorded" for anything else.

    >>> number(-0.4567, 2), number(None), number(0.00012345, None)
    ('−0.46', 'not recorded', '0.0001234')
    """
    found = finite(value)
    if found is None:
        return MISSING
    text = f"{found:.4g}" if digits is None else f"{found:.{digits}f}"
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]  # no minus zero
    return text.replace("-", "−")


def interval_text(calibration: Mapping[str, Any], name: str) -> str:
    """The 95% interval of a calibrated setting, to append to its value; empty if none is stored."""
    stored = calibration.get("interval")
    ends = stored.get(name) if isinstance(stored, dict) else None
    if not isinstance(ends, list) or len(ends) != 2 or finite(ends[0]) is None or finite(ends[1]) is None:
        return ""
    return f" (95% interval {number(ends[0])} to {number(ends[1])})"


def plain(value: Any) -> str:
    """A setting or a note as text, with short numbers and commas in lists."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return str(value)


def picture_uri(path: str | None, folder: Path, edit: ImageEdit | None = None) -> str | None:
    """An image as a ``data:`` URI, at most :data:`MAX_PIXELS` wide and high; ``None`` if it cannot be read.

    Args:
        path: absolute, or relative to ``folder`` or to the working directory.
        folder: the run's folder.
        edit: applied to the image.
    """
    from PIL import Image

    if not path or "\0" in path:
        return None
    candidates = [p for p in (folder / path, Path(path)) if os.path.isfile(p)]
    if not candidates:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageRef(path=candidates[0], edit=edit).open()
    except (
        Exception
    ):  # Pillow's plugins raise many types of error on broken files; the page shows a note instead
        return None
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    return _embedded(image)


def strip_uri(path: str | None, folder: Path) -> str | None:
    """Some frames of a video side by side as a ``data:`` URI; ``None`` if it cannot be read.

    Args:
        path: of a file or a folder of frames; absolute, or relative to ``folder`` or to the working directory.
        folder: the run's folder.
    """
    from PIL import Image

    if not path or "\0" in path:
        return None
    found = next((p for p in (folder / path, Path(path)) if p.exists()), None)
    try:
        clip = None if found is None else decoded(VideoRef(found, sampling=_STRIP))
    except (CwdpoError, OSError):  # damaged, or PyAV is not installed; the page shows a note instead
        return None
    if clip is None:
        return None
    n, height, width, _ = clip.frames.shape
    # [T, H, W, 3] to [H, T * W, 3]: the frames from left to right.
    return _embedded(Image.fromarray(clip.frames.swapaxes(0, 1).reshape(height, n * width, 3)))


def _embedded(image: Image) -> str:
    """The image as a ``data:`` URI."""
    drawing = image.getcolors(256) is not None
    out = io.BytesIO()
    if drawing:
        image.save(out, "PNG", optimize=True)
    else:
        image.save(out, "JPEG", quality=82)
    kind = "png" if drawing else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
