"""The records that all rooms share. Does not import torch."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Origin = Literal["dataset", "perturbed", "on_policy"]
NEW_TOKENS = 48
"""Default of all settings ``max_new_tokens``: samples for calibration, probes, negatives and evaluation."""


@dataclass(frozen=True)
class ImageEdit:
    """A change to an image when it is opened; the size stays the same.

    Attributes:
        box: left, top, right and bottom of the part that is kept, as shares of width and height; it is scaled to the
            size of the whole image.
        noise: variance of Gaussian noise, from 0 to 1, for values scaled to -1..1; the image itself is multiplied by
            ``sqrt(1 - noise)``, as in the forward process of a diffusion model.
        seed: of the noise.
    """

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1 and 0 <= self.noise <= 1):
            raise ValueError("box: 0 <= left < right <= 1 and 0 <= top < bottom <= 1; noise: from 0 to 1")

    def applied(self, image: Image) -> Image:
        """The changed copy of an RGB image."""
        import numpy as np
        from PIL import Image

        width, height = image.size
        left, top, right, bottom = self.box
        region = (left * width, top * height, right * width, bottom * height)
        changed = image.resize(image.size, Image.Resampling.BICUBIC, box=region)
        if not self.noise:
            return changed
        values = np.asarray(changed, dtype=np.float64) / 127.5 - 1
        drawn = np.random.default_rng(self.seed).standard_normal(values.shape)
        noisy = np.sqrt(1 - self.noise) * values + np.sqrt(self.noise) * drawn
        return Image.fromarray(np.rint((noisy.clip(-1, 1) + 1) * 127.5).astype(np.uint8))


@dataclass(frozen=True)
class ImageRef:
    """An image, given by its path or by its encoded bytes; it is decoded, and edited, when it is opened."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    edit: ImageEdit | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Paths are read back as the same objects: making one costs as much as the rest of a stored row."""
        return _image, (None if self.path is None else str(self.path), self.data, self.edit)

    def encoded(self) -> bytes:
        """The encoded bytes (JPEG, PNG, ...): as stored, or a PNG of the edited image."""
        if self.edit is None:
            return self.stored()
        buffer = io.BytesIO()
        self.open().save(buffer, format="PNG")
        return buffer.getvalue()

    def stored(self) -> bytes:
        """The encoded bytes of the image without its edit."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()

    def as_value(self) -> Any:
        """The image as a value of a JSON row that :class:`cwdpo.data.images.ImageFolder` reads again."""
        if self.edit is None and self.path is not None:
            return str(self.path)
        place = (
            {"path": str(self.path)}
            if self.path is not None
            else {"bytes": base64.b64encode(self.stored()).decode("ascii")}
        )
        return place if self.edit is None else {**place, "edit": asdict(self.edit)}

    def is_altered(self) -> bool:
        """Whether opening the image scales its values or puts it on a white background, see :func:`as_rgb`."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.stored()), formats=image_formats()) as image:
                if is_deep(image) or not has_alpha(image):
                    return is_deep(image)
                least: Any = image.convert("RGBA").getchannel("A").getextrema()[0]
                return bool(least < 255)
        except Exception:  # Pillow's plugins raise many types of error; opening the image reports the problem
            return False

    def open(self) -> Image:
        """The decoded image as 8-bit RGB (see :func:`as_rgb`), with EXIF rotation and its edit applied.

        Raises:
            OSError: the file cannot be read or is not an image (``PIL.UnidentifiedImageError``).
            ValueError: a pixel value is not finite, or Pillow cannot convert the image's mode to RGB.
            PIL.Image.DecompressionBombError: the image has more pixels than Pillow's limit.
        """
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(self.stored()), formats=image_formats()) as image:
            opened = as_rgb(ImageOps.exif_transpose(image))
        return opened if self.edit is None else self.edit.applied(opened)


def _image(path: str | None, data: bytes | None, edit: ImageEdit | None) -> ImageRef:
    return ImageRef(None if path is None else _path(path), data, edit)


@lru_cache(maxsize=4096)
def _path(text: str) -> Path:
    return Path(text)


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
    """Whether an image has more than 8 bits per channel (Pillow's modes I;16, I and F)."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def has_alpha(image: Image) -> bool:
    """Whether an image may have transparent pixels."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def as_rgb(image: Image) -> Image:
    """Convert an image to RGB with 8 bits per channel.

    Pillow's own conversion clips values above 255, which makes most images with more than 8 bits white, and it shows
    the hidden colours of transparent pixels. Here an image with more than 8 bits is scaled linearly, so that its
    smallest value becomes 0 and its largest 255 (128 everywhere if all values are equal). A transparent image is put on
    a white background, as Qwen's and vLLM's code does.

    Raises:
        ValueError: a value is not finite, or Pillow cannot convert the mode.
    """
    from PIL import Image

    if is_deep(image):
        return _scaled(image).convert("RGB")
    if has_alpha(image):
        # Pillow cannot convert premultiplied grey (La) to RGBA directly.
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
        raise ValueError(f"the image (mode {image.mode}) has values that are not finite")
    share = (values - low) / (high - low) if high > low else np.full_like(values, 128 / 255)
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are kept, and how large.

    Attributes:
        fps: frames a second that are kept; also the rate of a folder of frames, which has none of its own.
        max_frames: most frames of one video.
        max_pixels: most pixels of a frame (width x height); larger frames are scaled down. ``None``: no limit.
    """

    fps: float = 2.0
    max_frames: int = 32
    max_pixels: int | None = 512 * 512


SAMPLING = VideoSampling()


@dataclass(frozen=True)
class VideoRef:
    """A video: its file, a folder of frames, or its encoded bytes; :mod:`cwdpo.videos` decodes it."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    sampling: VideoSampling = SAMPLING


class Place(Enum):
    """The place of a video in a turn. The place of an image is ``None``."""

    VIDEO = "video"


VIDEO = Place.VIDEO

TOOLS = "tools"
"""Role of a prompt's first message if the model may call tools: its one part is their list in JSON."""


@dataclass(frozen=True)
class Message:
    """One turn of a prompt.

    An entry of ``parts`` is a text, or a place: ``None`` for the next image, ``VIDEO`` for the next video. ``more`` is
    an object in JSON with further keys of the turn: ``tool_calls``, ``tool_call_id``, ``name``.
    """

    role: str
    parts: tuple[str | Place | None, ...]
    more: str = ""

    def as_chat(self) -> dict[str, Any]:
        """The turn in the form that transformers' chat templates take."""
        content = [
            {"type": "text", "text": p}
            if isinstance(p, str)
            else {"type": "video" if p is VIDEO else "image"}
            for p in self.parts
        ]
        return {"role": self.role, "content": content, **self.further}

    @property
    def further(self) -> dict[str, Any]:
        """``more`` as a mapping."""
        return dict(json.loads(self.more)) if self.more else {}

    @property
    def text(self) -> str:
        """The text parts, joined by a newline."""
        return "\n".join(self.texts)

    @property
    def texts(self) -> list[str]:
        """The text parts that are not empty."""
        return [part for part in self.parts if isinstance(part, str) and part]


def without_tools(prompt: Sequence[Message]) -> tuple[tuple[Message, ...], list[Any]]:
    """The turns of a prompt, and the tools that it offers; an empty list if none."""
    turns = tuple(message for message in prompt if message.role != TOOLS)
    tools = [json.loads(m.text or "[]") for m in prompt if m.role == TOOLS]
    return turns, tools[0] if tools else []


@dataclass(frozen=True)
class Completion:
    """One response text, its origin and how it was made.

    ``kind`` is the kind of a negative (``hard``, ``medium``, ``easy``, ``shuffled``, ...). ``made`` records how it was
    made: the edit, or the sampler's settings and the policy's step. ``images`` are set for an image-side negative: a
    text, often chosen's own, that is rejected as the response to these images instead of the example's.
    """

    text: str
    origin: Origin = "dataset"
    kind: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImageRef, ...] | None = None

    def as_row(self) -> dict[str, Any]:
        """An entry of the column ``negatives`` in JSON rows."""
        own = {} if self.images is None else {"images": [image.as_value() for image in self.images]}
        return {
            "text": self.text,
            "kind": self.kind,
            "origin": self.origin,
            "made": dict(self.made),
            **own,
        }


@dataclass(frozen=True)
class Example:
    """One prompt (images, videos and messages) with its chosen response and its negatives.

    Attributes:
        rejected: the negatives of stage 2; may be empty.
        gentle: the negatives of stage 1; may be empty.
        references: responses known to be true, for judges and for perturbations.
        where: file and row, for messages.
        extra: further columns, for example for a judge (of the embedded world: the scene).
        source: the name of its data set in a mixture (``data.sources``), else empty.
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
    source: str = ""
    videos: tuple[VideoRef, ...] = ()

    @property
    def pictured(self) -> bool:
        """Whether the prompt has an image or a video."""
        return bool(self.images or self.videos)

    @property
    def all_images(self) -> tuple[ImageRef, ...]:
        """The images of the prompt, then those of image-side negatives."""
        sides = (*self.rejected, *self.gentle)
        return (*self.images, *(image for c in sides for image in c.images or ()))

    @property
    def prompt_text(self) -> str:
        """The text of the last user turn."""
        return next((m.text for m in reversed(self.prompt) if m.role == "user"), "")


@dataclass(frozen=True)
class Reading:
    """One measured number, the mean over ``n`` values; ``value`` is ``None`` if n is 0.

    ``low`` and ``high`` are the ends of its 95% interval, if one was computed.
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

    Attributes:
        text: the response.
        ended: whether the response ended before the limit of new tokens.
        n_tokens: number of tokens, including the end token; ``None`` for servers.
        mean_logp: log-likelihood per token under the policy at temperature 1, in nats; ``None`` for greedy responses
            and for servers.
        right: whether the judge calls it right; ``None`` without a judgement.
        engine_tokens, engine_mean_logp: number of tokens and log-likelihood per token (nats) that a server reports;
            ``None`` if it does not, and for samples of this process.
    """

    text: str
    ended: bool
    n_tokens: int | None = None
    mean_logp: float | None = None
    right: bool | None = None
    engine_tokens: int | None = None
    engine_mean_logp: float | None = None
