"""Processed images on disk, shared between epochs, runs and processes.

One file holds the inputs of the vision tower of one prompt. Its name is a digest of all they depend on: the bytes of
the image files, what is changed of them, the processor's settings, the versions of the packages that process, and
the prompt's token ids. So nothing has to be thrown away when data or settings change. A file that is damaged is made
again. The folder is bounded: the files that were not used for the longest time are removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from cwdpo.errors import FileError
from cwdpo.files.reading import read_bytes
from cwdpo.files.writing import replacing

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("cwdpo")
_FOLDER = "processed-images-1"
"""Only files in this folder of the cache are ever removed. The number is the version of the format."""
_LEFT = 3600.0
"""Seconds after which a temporary file is what a killed process left."""
_MOST = 2**32
"""Bytes of the largest file that is read."""


class ImageCache:
    """A folder of processed images. Several processes may read and write it at once.

    Args:
        folder: where; it is created when the first image is stored.
        gb: size in GiB. Each process looks at the size of the whole folder when it starts to write, and again whenever
            it has written 2% of ``gb``; so n processes exceed ``gb`` by n times 2% at most.
    """

    def __init__(self, folder: Path, gb: float) -> None:
        self._folder, self._most = folder / _FOLDER, gb * 2**30
        self._until_look = 0.0
        self._broken = False

    def __reduce__(self) -> tuple[object, ...]:
        return ImageCache, (self._folder.parent, self._most / 2**30)

    @staticmethod
    def key(digest: str, ids: tuple[int, ...], per_token: Mapping[str, tuple[int, ...]]) -> str:
        """The name under which the images of a prompt are stored.

        Args:
            digest: :attr:`cwdpo.data.encode.prompts.EncodedPrompt.image_digest`.
            ids, per_token: the encoded prompt; some families' inputs (cross-attention masks) depend on it.
        """
        said = repr((digest, ids, sorted(per_token.items())))
        return blake2b(said.encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The stored images, bit for bit; ``None`` if there are none, or they are damaged: those are removed."""
        from safetensors.torch import load

        path = self._path(key)
        try:
            data = read_bytes(path, _MOST)
            images = load(data)
            said = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["crc32"]
            whole = said == _sum(images)
        except FileError:
            return None
        except Exception:  # a damaged file fails in many ways
            whole = False
        with contextlib.suppress(OSError):  # another process may have removed it
            os.utime(path) if whole else path.unlink()
        return images if whole else None

    def put(self, key: str, images: Mapping[str, Tensor]) -> None:
        """Store the images. What the disk cannot take is not stored, which is said once."""
        from safetensors.torch import save

        if self._broken or not images or self._path(key).exists():
            return
        stored = {name: value.contiguous() for name, value in images.items()}
        data = save(stored, {"crc32": _sum(stored)})
        if len(data) > self._most:
            return
        try:
            if self._until_look < len(data):
                self._make_room(len(data))
            with replacing(self._path(key), durable=False) as temporary:
                temporary.write_bytes(data)
            self._until_look -= len(data)
        except OSError as error:
            self._broken = True
            logger.warning(
                "%s: processed images are no longer stored (%s); the run goes on without",
                self._folder.parent,
                error.strerror or error,
            )

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"

    def _make_room(self, needed: int) -> None:
        """Remove the files that were not used for the longest time, if there is no room for some bytes."""
        found: list[tuple[float, int, str]] = []
        for part in os.scandir(self._folder) if self._folder.is_dir() else ():
            if not part.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(part):
                try:
                    info = file.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process removed it
                    continue
                left = file.name.endswith(".tmp") and info.st_mtime < time.time() - _LEFT
                if left or file.name.endswith(".safetensors"):
                    found.append((0.0 if left else info.st_mtime, info.st_size, file.path))
        look = max(0.02 * self._most, needed)
        beyond = sum(size for _, size, _ in found) + look - self._most
        for used, size, path in sorted(found):
            if beyond <= 0 and used:
                break
            Path(path).unlink(missing_ok=True)
            beyond -= size
        self._until_look = look


def _sum(images: Mapping[str, Tensor]) -> str:
    """Checksum of all values."""
    import torch

    total = 0
    for name in sorted(images):
        value = images[name].reshape(-1).view(torch.uint8)
        total = zlib.crc32(value.numpy().data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"
