"""Decodes videos: which frames are kept, and these frames as arrays. PyAV reads files, Pillow reads folders of frames.

Frames are decoded one after the other, and only those that are kept stay in memory. Sound is not read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwdpo.errors import DataError, optional_package
from cwdpo.records import ImageRef, VideoRef, VideoSampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

INSTALL = 'pip install "cwdpo[video]"'
CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "ogg", "flv", "asf", "gif")
"""FFmpeg's names of the file formats that are read. It knows more: a playlist, for one, would make it open other files
and addresses, whatever the file is called."""
MOST_FRAMES = 1_000_000
"""Frames of one video, about nine hours at 30 a second."""
_FRAME_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


class VideoError(DataError):
    """A video that cannot be used. ``kind`` is a short name by which problems are counted."""

    def __init__(
        self, kind: str, message: str, remedy: str = "fetch the file again, or leave the row out"
    ) -> None:
        super().__init__(f"{message}: {remedy}")
        self.kind, self.message, self.remedy = kind, message, remedy


@dataclass(frozen=True)
class VideoFacts:
    """What a video's header says: frame size in pixels as stored, number of frames, frames a second.

    ``kept``: number of frames that are kept of it.
    """

    width: int
    height: int
    frames: int
    fps: float
    kept: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.fps


@dataclass(frozen=True)
class Clip:
    """The kept frames of a video.

    Attributes:
        frames: [T, height, width, 3] RGB values from 0 to 255.
        indices: [T] the numbers of these frames in the video, from 0.
        facts: the whole video.
        resized: whether some frames had another size than the first one, to which they were scaled.
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    facts: VideoFacts
    resized: bool = False

    def padded(self, multiple: int) -> Clip:
        """The clip whose last frame is repeated until there are ``multiple`` frames at least."""
        import numpy as np

        lacking = multiple - len(self.indices)
        if lacking <= 0:
            return self
        frames = np.concatenate([self.frames, np.repeat(self.frames[-1:], lacking, axis=0)])
        return replace(self, frames=frames, indices=(*self.indices, *[self.indices[-1]] * lacking))

    @property
    def metadata(self) -> dict[str, Any]:
        """The clip in the form of transformers' ``VideoMetadata``; some processors write its times into the prompt."""
        return {
            "total_num_frames": self.facts.frames,
            "fps": self.facts.fps,
            "width": self.frames.shape[2],
            "height": self.frames.shape[1],
            "duration": self.facts.seconds,
            "video_backend": "pyav",
            "frames_indices": list(self.indices),
        }


def kept_frames(frames: int, fps: Fraction, sampling: VideoSampling) -> tuple[int, ...]:
    """The numbers of the frames that are kept: the first frames of equal intervals.

    Args:
        frames: number of frames of the video.
        fps: its frames a second.
        sampling: ``fps`` frames a second are kept, ``max_frames`` at most, one at least.

    >>> kept_frames(50, Fraction(10), VideoSampling(fps=2, max_frames=4))
    (0, 12, 25, 37)
    """
    wanted = math.floor(frames * Fraction(sampling.fps).limit_denominator(10_000) / fps)
    n = max(1, min(wanted, sampling.max_frames, frames))
    return tuple(i * frames // n for i in range(n))


def video_facts(video: VideoRef) -> VideoFacts:
    """What is known of a video without decoding all of it.

    Raises:
        VideoError: it cannot be opened, or is too large.
        MissingPackageError: PyAV is not installed.
    """
    if video.path is not None and video.path.is_dir():
        files = frame_files(video.path)
        width, height = _picture(files[0]).size
        return _facts(
            width, height, len(files), Fraction(video.sampling.fps).limit_denominator(10_000), video.sampling
        )
    with _opened(video) as (container, stream, name):
        return _header(container, stream, name, video.sampling)[0]


def decoded(video: VideoRef) -> Clip:
    """The kept frames of a video. Never more than these frames are in memory.

    Frames of another size than the first are scaled to it, because processors take one array for a video.

    Raises:
        VideoError: it cannot be opened, a frame is damaged, it ends too early, or it is too large.
        MissingPackageError: PyAV is not installed.
    """
    if video.path is not None and video.path.is_dir():
        return _of_folder(video.path, video.sampling)
    with _opened(video) as (container, stream, name):
        facts, fps = _header(container, stream, name, video.sampling)
        indices = kept_frames(facts.frames, fps, video.sampling)
        gathered = _Gathered(video.sampling)
        wanted, n = set(indices), 0
        for frame in islice(_frames(container, stream, name), indices[-1] + 1):
            if n in wanted:
                gathered.add(_upright(frame))
            n += 1
    if n <= indices[-1]:
        raise VideoError("video-damaged", f"{name}: it ends after {n} of {facts.frames} frames")
    return gathered.clip(indices, facts)


def _frames(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """The frames in their order; a damaged one is an error, because those after it are made from it."""
    source, n = container.decode(stream), 0
    while True:
        try:
            frame = next(source, None)
        except Exception as error:  # FFmpeg's errors are of many types
            raise VideoError(
                "video-damaged", f"{name}: frame {n + 1} cannot be decoded ({_said(error)})"
            ) from None
        if frame is None:
            return
        n += 1
        _check_size(frame.width, frame.height, name)
        if frame.is_corrupt:
            raise VideoError("video-damaged", f"{name}: frame {n} is damaged")
        yield frame


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder of frames, sorted by name; numbers in names are compared as numbers (2 before 10).

    Raises:
        VideoError: there is none, or a link leads out of the folder.
    """
    folder = folder.resolve()
    files = [f for f in folder.iterdir() if f.suffix.lower() in _FRAME_FILES and not f.name.startswith(".")]
    if not files:
        raise VideoError(
            "video-missing",
            f"{folder}: no image in this folder of frames",
            "name a video, or a folder with its frames",
        )
    if len(files) > MOST_FRAMES:
        raise VideoError(
            "video-bomb", f"{folder}: {len(files)} frames; allowed: {MOST_FRAMES}", "leave frames out"
        )
    for file in files:
        if file.is_symlink() and not file.resolve().is_relative_to(folder):
            raise VideoError(
                "video-escapes",
                f"{file}: a link that leads out of its folder; allowed: frames that lie in it",
                "copy the frame into the folder",
            )
    return sorted(files, key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", f.name)])


class _Gathered:
    """Collects frames as arrays of the size of the first one."""

    def __init__(self, sampling: VideoSampling) -> None:
        self._sampling = sampling
        self._frames: list[NDArray[np.uint8]] = []
        self._source: tuple[int, int] | None = None
        self._resized = False

    def add(self, image: Image) -> None:
        """Add the next frame, scaled to at most ``max_pixels``."""
        import numpy as np
        from PIL.Image import Resampling

        if self._source is None:
            self._source = image.size
        self._resized = self._resized or image.size != self._source
        size = fitted(self._source, self._sampling.max_pixels)
        self._frames.append(
            np.asarray(image if image.size == size else image.resize(size, Resampling.BICUBIC))
        )

    def clip(self, indices: Sequence[int], facts: VideoFacts) -> Clip:
        """All frames in one array."""
        import numpy as np

        return Clip(np.stack(self._frames), tuple(indices), facts, self._resized)


def fitted(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """Width and height scaled to at most ``max_pixels`` in the same proportion, each at least 1."""
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, min(math.floor(width * scale), max_pixels)), max(
        1, min(math.floor(height * scale), max_pixels)
    )


def _of_folder(folder: Path, sampling: VideoSampling) -> Clip:
    files = frame_files(folder)
    fps = Fraction(sampling.fps).limit_denominator(10_000)
    indices = kept_frames(len(files), fps, sampling)
    gathered, size = _Gathered(sampling), (0, 0)
    for number, index in enumerate(indices):
        image = _picture(files[index])
        size = size if number else image.size
        gathered.add(image)
    return gathered.clip(indices, _facts(*size, len(files), fps, sampling))


def _picture(file: Path) -> Image:
    try:
        return ImageRef(path=file).open()
    except Exception as error:  # Pillow's plugins raise errors of many types
        raise VideoError("video-damaged", f"{file}: the frame cannot be decoded ({_said(error)})") from None


@contextmanager
def _opened(video: VideoRef) -> Iterator[tuple[Any, Any, str]]:
    """Container, its first stream of pictures, and a name for messages."""
    av = optional_package("av", "decoding videos", INSTALL)
    name = "the video's bytes" if video.path is None else str(video.path)
    try:
        file = io.BytesIO(video.data or b"") if video.path is None else video.path.open("rb")
    except OSError as error:
        raise VideoError("video-missing", f"{name}: cannot be read ({error.strerror})") from None
    with file:
        # A stream instead of a name, and no format that names other files: nothing else is opened.
        try:
            container = av.open(
                file, options={"format_whitelist": ",".join(CONTAINERS)}, metadata_errors="replace"
            )
        except Exception as error:  # FFmpeg's errors are of many types
            raise VideoError(
                "video-unreadable", f"{name} is not a video that PyAV can read ({_said(error)})"
            ) from None
        with container:
            if not container.streams.video:
                raise VideoError("video-unreadable", f"{name} has no pictures, only sound or texts")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(
                    "video-unreadable", f"{name}: its encoding is not known to PyAV", "convert it to H.264"
                )
            yield container, stream, name


def _header(container: Any, stream: Any, name: str, sampling: VideoSampling) -> tuple[VideoFacts, Fraction]:
    _check_size(stream.width, stream.height, name)
    frames = int(stream.frames)
    if frames <= 0:  # Matroska does not say: its packets are counted, without decoding them
        try:
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            container.seek(0)
        except Exception as error:
            raise VideoError("video-damaged", f"{name}: cannot be read to its end ({_said(error)})") from None
    if frames <= 0:
        raise VideoError("video-damaged", f"{name}: it has no frame")
    if frames > MOST_FRAMES:
        raise VideoError(
            "video-bomb", f"{name}: {frames} frames; allowed: {MOST_FRAMES}", "cut it into parts"
        )
    fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
    fps = fps if fps > 0 else Fraction(sampling.fps).limit_denominator(10_000)
    return _facts(stream.width, stream.height, frames, fps, sampling), fps


def _facts(width: int, height: int, frames: int, fps: Fraction, sampling: VideoSampling) -> VideoFacts:
    return VideoFacts(width, height, frames, float(fps), len(kept_frames(frames, fps, sampling)))


def _check_size(width: int, height: int, name: str) -> None:
    from PIL.Image import MAX_IMAGE_PIXELS

    if MAX_IMAGE_PIXELS is not None and width * height > MAX_IMAGE_PIXELS:
        raise VideoError(
            "video-bomb",
            f"{name}: frames of {width} x {height} pixels; allowed: {MAX_IMAGE_PIXELS}",
            "scale it down",
        )


def _upright(frame: Any) -> Image:
    """The frame as its container says it is shown: phones store turned pictures."""
    from PIL.Image import Transpose, fromarray

    image = fromarray(frame.to_ndarray(format="rgb24"))
    turns = {90: Transpose.ROTATE_90, 180: Transpose.ROTATE_180, 270: Transpose.ROTATE_270}
    turn = turns.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)


def _said(error: Exception) -> str:
    """An error on one line, without FFmpeg's number and name of the file."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text[:200]}"
