"""Stores videos beside rows that are written: a link to the file, or a copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cwdpo.data.contents import video_digest
from cwdpo.files.writing import clear_unfinished, replacing
from cwdpo.records import VideoRef
from cwdpo.videos import frame_files


def store_video(video: VideoRef, folder: Path, suffix: str) -> str:
    """Store a video in ``folder``, named by its digest; returns its name there.

    Args:
        video: a file, a folder of frames (whose images are stored in a folder), or bytes.
        folder: is made if it is not there.
        suffix: of the name, for files.

    Raises:
        DataError: the video cannot be read.
        OSError: it cannot be written.
    """
    name = video_digest(video).hex()
    folder.mkdir(parents=True, exist_ok=True)
    if video.path is not None and video.path.is_dir():
        for file in frame_files(video.path):
            (folder / name).mkdir(exist_ok=True)
            _store(file, folder / name / file.name)
        return name
    place = folder / (name + suffix)
    if video.path is not None:
        _store(video.path, place)
    elif not place.is_file():
        with replacing(place) as temporary:
            temporary.write_bytes(video.data or b"")
    return place.name


def _store(old: Path, new: Path) -> None:
    clear_unfinished(new)
    if new.is_file() or linked(old, new):
        return
    with replacing(new) as temporary:
        shutil.copyfile(old, temporary)


def linked(old: Path, new: Path) -> bool:
    """Make ``new`` a hard link to ``old``; whether that was possible."""
    try:
        os.link(old, new)
    except OSError:  # another file system, or a file system without links
        return False
    return True
