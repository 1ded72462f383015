"""The records that move through the rooms. No torch is imported here."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Origin = Literal["dataset", "perturbed", "on_policy"]


@dataclass(frozen=True)
class ImageRef:
    """An image by its path or by its encoded bytes; decoded only when opened."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    def encoded(self) -> bytes:
        """The encoded bytes (JPEG, PNG, ...), as stored."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()

    def is_altered(self) -> bool:
        """Whether opening changes what it shows: scales its values, or lays it on white (:func:`as_rgb`)."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.encoded()), formats=image_formats()) as image:
                if is_deep(image) or not has_alpha(image):
                    return is_deep(image)
                least: Any = image.convert("RGBA").getchannel("A").getextrema()[0]
                return bool(least < 255)
        except Exception:  # Pillow's plugins raise nearly anything; opening it says what is wrong
            return False

    def open(self) -> Image:
        """The decoded picture in RGB of 8 bits (see :func:`as_rgb`), EXIF rotation applied.

        Raises:
            OSError: the file cannot be read or is not an image (``PIL.UnidentifiedImageError``).
            ValueError: pixels that are not finite, or a mode that Pillow cannot bring to RGB.
            PIL.Image.DecompressionBombError: more pixels than Pillow's limit allows.
        """
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(self.encoded()), formats=image_formats()) as image:
            return as_rgb(ImageOps.exif_transpose(image))


FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO", "TGA",
)  # fmt: skip
"""Pictures that are read. Pillow knows more: an EPS, for one, would be handed to Ghostscript, whatever it is called."""


@cache
def image_formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow can read, for ``Image.open(..., formats=...)``."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_deep(image: Image) -> bool:
    """Whether a picture has more than 8 bits a channel (Pillow's modes I;16, I and F)."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def has_alpha(image: Image) -> bool:
    """Whether a picture may be transparent somewhere."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def as_rgb(image: Image) -> Image:
    """A picture in RGB of 8 bits a channel.

    Pillow's own conversion clips deep pictures at 255, which turns most of them white, and shows the hidden colours
    under transparent pixels. Here a deep picture is scaled linearly from its own darkest and brightest value to 0 and
    255 (one of a single value becomes 128), and a transparent one is laid on white, as Qwen's and vLLM's code does.

    Raises:
        ValueError: a value that is not finite, or a mode that Pillow cannot convert.
    """
    from PIL import Image

    if is_deep(image):
        return _scaled(image).convert("RGB")
    if has_alpha(image):
        # Pillow knows no direct way from premultiplied grey to RGBA.
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"a picture of mode {image.mode} with values that are not finite")
    share = (values - low) / (high - low) if high > low else np.full_like(values, 128 / 255)
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))


@dataclass(frozen=True)
class Message:
    """One turn of a prompt; ``parts`` holds text, or ``None`` where the next image stands."""

    role: str
    parts: tuple[str | None, ...]

    def as_chat(self) -> dict[str, Any]:
        """The turn as transformers' chat templates want it."""
        content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in self.parts]
        return {"role": self.role, "content": content}

    @property
    def text(self) -> str:
        """The text parts, joined by a newline."""
        return "\n".join(part for part in self.parts if part)


@dataclass(frozen=True)
class Completion:
    """One response text, where it came from and how it was made.

    ``kind`` names the sort of a negative (``hard``, ``medium``, ``easy``, ``shuffled``, ...);
    ``made`` records the edit, the sampler settings or the policy step.
    """

    text: str
    origin: Origin = "dataset"
    kind: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One prompt (images and messages) with its chosen response and everything offered against it.

    ``rejected`` are the negatives of stage 2, ``gentle`` those of stage 1; both may be empty.
    ``references`` are known true responses, used by judges and by perturbation.
    ``where`` names file and row for messages; ``extra`` keeps what a judge needs (for the world: its scene).
    """

    id: str
    images: tuple[ImageRef, ...]
    prompt: tuple[Message, ...]
    chosen: Completion
    rejected: tuple[Completion, ...] = ()
    gentle: tuple[Completion, ...] = ()
    references: tuple[str, ...] = ()
    where: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """The text of the last user turn."""
        return next((m.text for m in reversed(self.prompt) if m.role == "user"), "")


@dataclass(frozen=True)
class Reading:
    """One measured number with the count behind it; the mean of nothing is ``None``, not zero.

    ``low`` and ``high`` bound its 95% interval over the n values, where one was computed.
    """

    name: str
    value: float | None
    n: int
    unit: str = ""
    step: int = 0
    split: str = "validation"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Sample:
    """One response that a policy sampled.

    ``ended``: it ended by itself, within the most tokens. ``n_tokens`` counts the end token; a server gives none.
    ``mean_logp`` (nats per token) is under the sampling policy at temperature 1; ``None`` for greedy responses and for
    servers. ``right``: whether the judge finds it right; ``None``: not known, or no judge.
    """

    text: str
    ended: bool
    n_tokens: int | None = None
    mean_logp: float | None = None
    right: bool | None = None
