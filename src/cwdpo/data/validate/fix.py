"""Writes good rows unchanged to a new JSONL file; image paths are adapted to the new place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from cwdpo.data.read.files import LINES
from cwdpo.data.read.source import RawRow
from cwdpo.data.video_store import linked, store_video
from cwdpo.errors import DataError
from cwdpo.files.writing import clear_unfinished, temporary_name
from cwdpo.records import ImageRef, VideoRef

_SUFFIX = re.compile(r"\.\w{1,8}", re.ASCII)


@contextmanager
def good_rows(out: Path) -> Iterator[GoodRows]:
    """A writer of rows to ``out``; the file is created if the block ends without an error and wrote a row.

    Paths of images and videos below the folder of ``out`` become relative to it. Others, and those given as bytes, are
    linked or copied into ``<stem>_images`` next to it, because paths must not leave a data folder. Values that JSON
    does not support (for example dates) become text.

    Raises:
        DataError: ``out`` or its image folder exists, is not a ``.jsonl``, or cannot be written.
    """
    images = out.with_name(f"{out.stem}_images")
    temporary = temporary_name(out)
    if out.suffix.lower() not in LINES:
        raise DataError(f"--fix {out}: allowed: a name that ends in {' or '.join(LINES)}")
    if clear_unfinished(out) and not out.exists():  # killed before; it had found no folder of images
        shutil.rmtree(images, ignore_errors=True)
    for path in (out, images):
        if os.path.lexists(path):
            raise DataError(f"--fix {out}: {path} exists already; choose another name, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            rows = GoodRows(file, out.parent.resolve(), images)
            yield rows
            file.flush()
            os.fsync(file.fileno())
        if rows.count:
            os.replace(temporary, out)
            images = temporary  # so that the cleanup below does not remove the image folder
    except OSError as error:
        raise DataError(
            f"--fix {out}: cannot be written ({error.strerror or error}); nothing was left behind: free some space, "
            "or name a place that you may write to"
        ) from None
    finally:
        with suppress(OSError):  # in a read-only folder this fails even if the file does not exist
            temporary.unlink(missing_ok=True)
        shutil.rmtree(images, ignore_errors=True)


class GoodRows:
    """Writes rows to ``file`` in ``folder``; images from elsewhere go to the folder ``images``."""

    def __init__(self, file: BinaryIO, folder: Path, images: Path) -> None:
        self._file, self._folder, self._images = file, folder, images
        self.count = 0

    def write(self, raw: RawRow, pictures: Mapping[str, ImageRef | VideoRef]) -> None:
        """Write one row; ``pictures`` are its images and videos by key (``images[0]``).

        Raises:
            OSError: the row cannot be written.
        """
        assert isinstance(raw.value, dict)
        row = {key: self._placed(value, key, pictures) for key, value in raw.value.items()}
        same = all(new is old for new, old in zip(row.values(), raw.value.values(), strict=True))
        line = raw.line if same and raw.line is not None else _as_json(row)
        self._file.write(line + b"\n")
        self.count += 1

    def _placed(self, value: Any, key: str, pictures: Mapping[str, ImageRef | VideoRef]) -> Any:
        """The value with image paths for the new file; the same object if no path changes."""
        if key in pictures:
            named = self._named(value, pictures[key])
            edited = isinstance(value, Mapping) and value.get("edit") is not None
            return {"path": named, "edit": value["edit"]} if edited and isinstance(named, str) else named
        if isinstance(value, list):
            placed = [self._placed(one, f"{key}[{i}]", pictures) for i, one in enumerate(value)]
            return value if all(new is old for new, old in zip(placed, value, strict=True)) else placed
        if isinstance(value, dict):
            made = {name: self._placed(one, f"{key}.{name}", pictures) for name, one in value.items()}
            return value if all(made[name] is one for name, one in value.items()) else made
        return value

    def _named(self, value: Any, image: ImageRef | VideoRef) -> Any:
        named = value.get("path") if isinstance(value, Mapping) else value
        text = named if isinstance(named, str) else ""
        if image.path is None:
            # An image given as text (a data URI or base64) needs no change.
            return value if text and text is value else self._stored(image, Path(text).suffix)
        if (self._folder / text.removeprefix("file://")).resolve() == image.path:
            return value
        if image.path.is_relative_to(self._folder):
            return image.path.relative_to(self._folder).as_posix()
        return self._stored(image, image.path.suffix)

    def _stored(self, image: ImageRef | VideoRef, suffix: str) -> str:
        """Store an image or a video in the image folder, named by its digest; returns the path for the row."""
        if isinstance(image, VideoRef):
            return f"{self._images.name}/{store_video(image, self._images, suffix)}"
        data = image.stored()
        name = blake2b(data, digest_size=16).hexdigest() + (suffix if _SUFFIX.fullmatch(suffix) else "")
        path = self._images / name
        if not path.exists():
            self._images.mkdir(exist_ok=True)
            if image.path is None or not linked(image.path, path):
                path.write_bytes(data)
        return f"{self._images.name}/{name}"


def _as_json(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a column that is not read
        return json.dumps(row, default=str).encode()
