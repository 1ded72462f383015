"""Small videos for tests, written by PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

Frame = Any
"""[height, width, 3] values from 0 to 255."""


def write_video(path: Path, frames: Iterable[Frame], *, fps: int = 10, codec: str = "libx264") -> Path:
    """Write frames of one size to a file; its ending says the container."""
    with av.open(str(path), "w", format="mpegts" if path.suffix == ".ts" else None) as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=fps)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(n: int, size: tuple[int, int] = (32, 32)) -> list[Frame]:
    """Frames of one grey each, a step of 5 lighter from frame to frame: (width, height) pixels."""
    width, height = size
    return [np.full((height, width, 3), 5 * i % 256, np.uint8) for i in range(n)]


def greys(frames: Sequence[Frame] | np.ndarray) -> list[int]:
    """The numbers of :func:`grey` frames, from their middle pixels; encoders change values by little."""
    return [round(float(f[f.shape[0] // 2, f.shape[1] // 2].mean()) / 5) for f in frames]
