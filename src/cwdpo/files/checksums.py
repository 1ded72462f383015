"""Checksums of finished files, which are compared before the files are used again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cwdpo.errors import FileError
from cwdpo.files.reading import open_file, read_object
from cwdpo.files.writing import write_json

FILE = "checksums.json"
_CHUNK = 2**20


class Running:
    """The digest of a growing file; each byte is read once only."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)
        self.size = 0

    def read_on(self, path: Path, size: int | None = None) -> str:
        """The digest of the file's first ``size`` bytes; default: of the whole file.

        Raises:
            FileError: the file cannot be read.
        """
        with open_file(path) as file:
            file.seek(self.size)
            while size is None or self.size < size:
                data = file.read(_CHUNK if size is None else min(_CHUNK, size - self.size))
                if not data:
                    break
                self._digest.update(data)
                self.size += len(data)
        return self._digest.hexdigest()

    def entry(self, path: Path) -> dict[str, Any]:
        """Size and digest of the whole file."""
        digest = self.read_on(path)
        return {"bytes": self.size, "blake2b": digest}


def write_checksums(folder: Path) -> None:
    """Write :data:`FILE` into a finished folder: size and digest of every file in it except README.md."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (FILE, "README.md")
    )
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda name: Running().entry(folder / name), names))
    write_json(folder / FILE, dict(zip(names, entries, strict=True)))


def damage(folder: Path) -> list[str]:
    """Problems of the files of a folder since :func:`write_checksums`; empty if it wrote no checksums.

    Returns:
        ``NAME is missing``, ``NAME was changed``, ... in order.
    """
    if not (folder / FILE).is_file():
        return []
    try:
        entries = read_object(folder / FILE)
    except FileError as error:
        return [str(error)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: difference(folder, name, entries[name]), entries)
        return [text for text in found if text]


def difference(folder: Path, name: str, entry: Any, *, grows: bool = False) -> str:
    """What is wrong with a file; an empty text if nothing.

    Args:
        folder, name: the file.
        entry: the stored result of :meth:`Running.entry`.
        grows: whether the file may have become longer.
    """
    size, digest = (entry.get("bytes"), entry.get("blake2b")) if isinstance(entry, dict) else (None, None)
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{FILE} names {name!r}, which is not in the folder"
    if not isinstance(size, int) or not isinstance(digest, str):
        return f"{FILE} contains no checksum of {name}"
    if not os.path.isfile(path):  # False also for names that no file can have
        return f"{name} is missing"
    now = path.stat().st_size
    if now < size or (now > size and not grows):
        return f"{name} has {now} bytes, but {size} were written"
    return "" if Running().read_on(path, size) == digest else f"{name} was changed"


def refuse_damage(folder: Path, remedy: str, more: Iterable[str] = ()) -> None:
    """Refuse a folder whose files are not as they were written.

    Args:
        folder: the folder.
        remedy: what to do, for the message.
        more: further problems.

    Raises:
        FileError: with the problems and the remedy.
    """
    refuse(folder, [*damage(folder), *more], remedy)


def refuse(folder: Path, problems: Sequence[str], remedy: str) -> None:
    """Refuse a folder with these problems, for example those that :func:`damage` found; nothing is read.

    Raises:
        FileError: with the problems and the remedy, if there are any.
    """
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise FileError(f"{folder}: damaged: {shown}: {remedy}")
