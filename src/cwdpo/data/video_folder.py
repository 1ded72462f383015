"""Videos of a row: found inside one folder only, and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cwdpo.data.digests import DigestMap, digest8
from cwdpo.data.inside import missing, path_inside
from cwdpo.data.problems import RowError, shown
from cwdpo.records import VideoRef, VideoSampling
from cwdpo.videos import Clip, VideoError, VideoFacts, decoded, frame_files, video_facts

FORMS = "a path inside the data folder (a file, or a folder of frames), {'bytes': ..., 'path': ...}, or bytes"


class VideoFolder:
    """Turns the video values of rows into VideoRefs and checks each file once.

    Args:
        root: resolved folder that paths are relative to and must not leave; ``None`` if there is none.
        check: see :class:`cwdpo.data.images.ImageFolder`; ``identify`` reads a video's header, ``decode`` the frames
            that are kept.
        seen: called with the facts of each video whose header was read, and whether its frames change their size.
    """

    def __init__(
        self, root: Path | None, check: str, seen: Callable[[VideoFacts, bool], None] | None = None
    ) -> None:
        self._root, self._check, self._seen = root, check, seen
        self._good = DigestMap()
        self._refused: dict[Path, tuple[str, str, str]] = {}

    def take(self, value: Any, key: str, sampling: VideoSampling) -> VideoRef:
        """The video of a value.

        Raises:
            RowError: the value is not a video, or the video is outside the folder, missing, damaged or too large.
            MissingPackageError: PyAV, which decodes files, is not installed.
        """
        if isinstance(value, Mapping) and (
            value.get("bytes") is not None or isinstance(value.get("path"), str)
        ):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes) and value:
            video = VideoRef(data=value, sampling=sampling)
            self._examine(video, key, "the video's bytes")
            return video
        if not isinstance(value, str) or not value or value.startswith("data:"):
            raise RowError(
                "wrong-type",
                key,
                f"{shown(value, 60)} is not a video; allowed: {FORMS}",
                "give each video in one of these forms",
            )
        path = path_inside(self._root, value, key, "video", FORMS)
        video, digest = VideoRef(path, sampling=sampling), digest8(bytes(path))
        if self._good.get(digest) is not None:
            return video
        if path not in self._refused:
            try:
                self._check_file(video, path, value, key)
            except RowError as error:
                self._refused[path] = error.kind, error.message, error.remedy
            else:
                self._good.add(digest)
                return video
        kind, message, remedy = self._refused[path]
        raise RowError(kind, key, message, remedy)

    def _check_file(self, video: VideoRef, path: Path, text: str, key: str) -> None:
        if path.is_dir():
            try:
                frame_files(path)  # also where nothing else is checked: its links must not lead out
            except VideoError as error:
                raise RowError(error.kind, key, error.message, error.remedy) from None
        elif self._check != "none" and not path.is_file():
            raise missing(self._root, text, key, "video")
        self._examine(video, key, shown(text, 200))

    def _examine(self, video: VideoRef, key: str, name: str) -> None:
        if self._check not in ("identify", "decode"):
            return
        try:
            found = decoded(video) if self._check == "decode" else video_facts(video)
        except VideoError as error:
            message = (
                error.message.replace(str(video.path), name) if video.path is not None else error.message
            )
            raise RowError(error.kind, key, message, error.remedy) from None
        if self._seen is not None:
            clip = found if isinstance(found, Clip) else None
            self._seen(
                found if isinstance(found, VideoFacts) else found.facts, clip is not None and clip.resized
            )
