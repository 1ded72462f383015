"""Sizes and modes of the images and videos of a data set, and how reading changes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwdpo.videos import VideoFacts


@dataclass(frozen=True)
class ImageFacts:
    """Size in pixels and colour mode of a stored image.

    ``deep``: it has more than 8 bits per channel, which are scaled; ``alpha``: it is transparent and is put on white
    (:func:`cwdpo.records.as_rgb`). Known only if the pixels were decoded: ``turned``: an EXIF tag sets another
    orientation, which is applied; ``animated``: it has several frames, of which the first is used.
    """

    width: int
    height: int
    mode: str
    deep: bool = False
    alpha: bool = False
    turned: bool = False
    animated: bool = False


@dataclass
class VideoStats:
    """Sizes in pixels, frames and seconds of the videos whose header was read; each file is counted once.

    ``kept``: frames that are kept of a video. ``changing``: videos whose frames change their size (known only if they
    were decoded).
    """

    n: int = 0
    width: tuple[int, int] | None = None
    height: tuple[int, int] | None = None
    frames: tuple[int, int] | None = None
    kept: tuple[int, int] | None = None
    seconds: float = 0.0
    changing: int = 0

    def add(self, facts: VideoFacts, changing: bool) -> None:
        """Count one video."""
        self.n += 1
        self.width, self.height = _widen(self.width, facts.width), _widen(self.height, facts.height)
        self.frames, self.kept = _widen(self.frames, facts.frames), _widen(self.kept, facts.kept)
        self.seconds += facts.seconds
        self.changing += changing

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON."""
        return asdict(self)

    def notes(self) -> list[str]:
        """How reading changes some of the videos."""
        said = "whose frames change their size, scaled to that of the first frame"
        return [f"{self.changing} of {self.n} videos {said}"] if self.changing else []

    def lines(self) -> list[str]:
        """The counts as text; empty if no video was read."""
        spans = (self.width, self.height, self.frames, self.kept)
        w, h, frames, kept = ("" if span is None else f"{span[0]} to {span[1]}" for span in spans)
        if not self.n:
            return []
        return [
            f"videos read: {self.n}, {self.seconds:.1f} seconds; {w} wide, {h} high (pixels); {frames} frames, of "
            f"which {kept} are kept",
            *(f"    {note}" for note in self.notes()),
        ]


@dataclass
class ImageStats:
    """Sizes in pixels and colour modes of the images whose header was read; each file is counted once.

    The other counts are of the fields of :class:`ImageFacts`.
    """

    n: int = 0
    width: tuple[int, int] | None = None
    height: tuple[int, int] | None = None
    modes: Counter[str] = field(default_factory=Counter)
    deep: int = 0
    alpha: int = 0
    turned: int = 0
    animated: int = 0

    def add(self, facts: ImageFacts) -> None:
        """Count one image."""
        self.n += 1
        self.modes[facts.mode] += 1
        self.width = _widen(self.width, facts.width)
        self.height = _widen(self.height, facts.height)
        self.deep += facts.deep
        self.alpha += facts.alpha
        self.turned += facts.turned
        self.animated += facts.animated

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON; modes are sorted by name."""
        return {
            "n": self.n,
            "width": self.width,
            "height": self.height,
            "modes": ordered(self.modes),
            "deep": self.deep,
            "alpha": self.alpha,
            "turned": self.turned,
            "animated": self.animated,
        }

    def notes(self) -> list[str]:
        """How reading changes some of the images."""
        told = (
            (self.deep, "with more than 8 bits per channel, each scaled from its own range to 0 to 255"),
            (self.alpha, "with an alpha channel, put on white"),
            (self.turned, "with an EXIF orientation, which is applied"),
            (self.animated, "animated, of which the first frame is used"),
        )
        return [f"{n} of {self.n} images {what}" for n, what in told if n]

    def lines(self) -> list[str]:
        """The counts as text; empty if no image was read."""
        if self.width is None or self.height is None:
            return []
        (w0, w1), (h0, h1) = self.width, self.height
        return [
            f"images read: {self.n}; {w0} to {w1} wide, {h0} to {h1} high (pixels); {counted(self.modes)}",
            *(f"    {note}" for note in self.notes()),
        ]


def _widen(span: tuple[int, int] | None, value: int) -> tuple[int, int]:
    return (value, value) if span is None else (min(span[0], value), max(span[1], value))


def ordered(counts: Counter[Any]) -> dict[str, int]:
    """Counts by name, sorted."""
    return {str(key): counts[key] for key in sorted(counts)}


def counted(counts: Counter[Any]) -> str:
    """Counts as text: ``a: 3, b: 1``."""
    return ", ".join(f"{key}: {n}" for key, n in ordered(counts).items()) or "none"
