"""What one reading of an image file tells: its digest, its size, and whether it ends as its format does.

Nothing is decoded. Each file is read once per process, and again only if its size, its times or its inode changed.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cwdpo.data.digests import digest8
from cwdpo.errors import DataError
from cwdpo.records import ImageRef, VideoRef, image_formats
from cwdpo.videos import frame_files

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that exchange width and height
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP")
_TAIL = 64  # bytes; a few bytes may follow the end mark
_PACKED = struct.Struct("<Q16sIIB")  # signature, digest, height, width, whether complete
_KNOWN: dict[int, bytes] = {}
"""By digest of the path. Packed, because there may be millions of files."""
_VIDEOS: dict[int, bytes] = {}
"""The digest of a video, by digest of its path and the signatures of its files."""


@dataclass(frozen=True)
class ImageContent:
    """An image file, not decoded; the edit of an :class:`ImageRef` is not considered.

    ``digest``: 16-byte blake2b digest of the encoded bytes. ``size``: (height, width) in pixels after EXIF rotation;
    ``None`` if it is not in the header. ``complete``: whether the file ends as its format does; if not, it may be cut
    off, and only decoding tells. Both are known for JPEG, PNG, GIF and WebP.
    """

    digest: bytes
    size: tuple[int, int] | None
    complete: bool


def image_content(image: ImageRef) -> ImageContent:
    """Read an image file, or take what an earlier reading of the same file found.

    Raises:
        DataError: the file cannot be read.
    """
    if image.data is not None or image.path is None:
        return _read(image, image.stored())
    try:
        signature = _signature(image.path)
        key = digest8(os.fsencode(image.path))
        if key in _KNOWN:
            known, digest, height, width, complete = _PACKED.unpack(_KNOWN[key])
            if known == signature:
                return ImageContent(digest, (height, width) if height else None, bool(complete))
        found = _read(image, image.stored())
    except OSError as error:
        raise DataError(
            f"{image.path}: cannot be read ({error.strerror}); restore it or drop the row"
        ) from None
    _KNOWN[key] = _PACKED.pack(signature, found.digest, *(found.size or (0, 0)), found.complete)
    return found


def known_contents(images: Iterable[ImageRef]) -> dict[int, bytes]:
    """What is known about the files of images, for :func:`remember_contents` in another process."""
    keys = {digest8(os.fsencode(image.path)) for image in images if image.path is not None}
    return {key: _KNOWN[key] for key in keys if key in _KNOWN}


def remember_contents(known: Mapping[int, bytes]) -> None:
    """Take over what another process knows, so that the files are not read again unless they changed."""
    _KNOWN.update(known)


def forget_contents() -> None:
    """Forget what is known about files: they are read again when they are used again."""
    _KNOWN.clear()
    _VIDEOS.clear()


def video_digest(video: VideoRef) -> bytes:
    """16-byte blake2b digest of a video's encoded bytes; of a folder of frames, of its files in their order.

    Frames are not decoded, and which of them are kept is not considered.

    Raises:
        DataError: a file cannot be read.
    """
    if video.path is None:
        return blake2b(video.data or b"", digest_size=16).digest()
    try:
        files = frame_files(video.path) if video.path.is_dir() else [video.path]
        signature = b"".join(_signature(file).to_bytes(8, "little") for file in files)
        key = digest8(os.fsencode(video.path) + signature)
        if key not in _VIDEOS:
            digest = blake2b(digest_size=16)
            for file in files:
                with file.open("rb") as stream:
                    while part := stream.read(1 << 20):
                        digest.update(part)
            _VIDEOS[key] = digest.digest()
    except OSError as error:
        raise DataError(
            f"{video.path}: cannot be read ({error.strerror}); restore it or drop the row"
        ) from None
    return _VIDEOS[key]


def _signature(path: Path) -> int:
    stat = path.stat()
    return digest8(repr((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)).encode())


def _read(image: ImageRef, data: bytes) -> ImageContent:
    digest = blake2b(data, digest_size=16).digest()
    try:
        size = _size(image, data)
    except Exception:  # Pillow's plugins raise many types of error; decoding the image reports the problem
        size = None
    return ImageContent(digest, size, _complete(data))


def _size(image: ImageRef, data: bytes) -> tuple[int, int] | None:
    """(height, width) as :meth:`cwdpo.records.ImageRef.open` gives them."""
    from PIL import Image

    if data.startswith(b"\x89PNG") and (b"eXIf" in data or b"tiff:Orientation" in data):
        width, height = (
            image.open().size
        )  # these chunks may follow the pixels, and Pillow decodes to find them
        return height, width
    with Image.open(io.BytesIO(data), formats=image_formats()) as opened:
        if opened.format not in _FORMATS:
            return None
        width, height = opened.size
        # Pillow decodes a PNG to look for an eXIf chunk behind the pixels; above we have seen that there is none.
        exif: Any = {} if opened.format == "PNG" else opened.getexif()
        return (width, height) if exif.get(_ORIENTATION) in _TURNED else (height, width)


def _complete(data: bytes) -> bool:
    """Whether the data end as JPEG, PNG, GIF or WebP files end; ``False`` for other formats."""
    tail = data[-_TAIL:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in tail
    if data.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if data.startswith(b"GIF8"):
        return tail.rstrip(b"\0").endswith(b"\0;")  # a lone ";" is also among compressed bytes
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return False
