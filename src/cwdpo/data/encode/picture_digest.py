"""The digest of all that the inputs of the vision tower depend on: settings, files, and how they are changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from cwdpo.data.contents import ImageContent, video_digest
from cwdpo.data.encode.clips import video_settings
from cwdpo.records import Example, ImageEdit, ImageRef


def picture_digest(settings: str, processor: Any, example: Example, contents: Sequence[ImageContent]) -> str:
    """Digest of the images and videos of a row as a processor sees them.

    Args:
        settings: what else the inputs of the vision tower depend on.
        processor: reads the videos.
        example: the row.
        contents: of the files of its images.

    Raises:
        DataError: a video cannot be read.
    """
    parts = [c.digest.hex() for c in contents]
    if example.videos:
        parts += [video_settings(processor), *(video_digest(video).hex() for video in example.videos)]
    # What else a reference says (all but its place) changes the pixels, so it is part of the digest.
    parts += [_edit(image.edit) for image in example.images]
    parts += [repr(replace(video, path=None, data=None)) for video in example.videos]
    digest = _begun(settings).copy()
    digest.update("".join(f"\0{part}" for part in parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _begun(settings: str) -> blake2b:
    return blake2b(settings.encode("utf-8", "surrogatepass"), digest_size=16)


@lru_cache(maxsize=4096)
def _edit(edit: ImageEdit | None) -> str:
    return repr(ImageRef(edit=edit))
