"""WebDataset's shards: a tar whose members of one name are a row."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from cwdpo.data.columns import IMAGE_KEYS, present
from cwdpo.data.problems import RowError, shown
from cwdpo.data.read.packed import open_bytes
from cwdpo.data.read.source import RawRow, as_row
from cwdpo.errors import DataError

_PICTURES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"}
_VIDEOS, _AUDIOS = {"mp4", "mkv", "avi", "mov", "webm"}, {"wav", "mp3", "flac", "ogg", "m4a"}
_TEXTS = {"txt", "text", "caption"}
_LARGEST = 1 << 30  # bytes of one member


def tar_rows(path: Path) -> Iterator[RawRow]:
    """A row for each sample of a shard: its ``.json``, with the pictures of the same name.

    As WebDataset has it, the name of a member up to the first dot of its last part is the sample's key, the rest says
    what it is, and members of one key follow each other. Pictures become ``image`` (one) or ``images`` (several, by
    name), unless the JSON names them: then a name is replaced by its member. A ``.txt`` without JSON becomes
    ``captions``. Films and sound become ``videos`` and ``audios``; other members are columns called by their ending.

    Raises:
        DataError: no tar, or one that ends too early.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            stream = _Watched(file)
            # As a stream: members are read in their order, and links and devices are not looked at.
            with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as archive:
                for key, members in _samples(archive, path):
                    number += 1
                    yield _row(path, number, key, members)
            stream.check_end()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(
            f"{path}: not readable as tar after row {number} ({why[:200]}); fetch it again"
        ) from None


class _Watched:
    """A stream that knows how it ended: ``tarfile`` takes a tar that is cut short for a shorter one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._tail = file, 0, b""

    def read(self, n: int) -> bytes:
        """The next bytes."""
        data = self._file.read(n)
        self._size += len(data)
        self._tail = (self._tail + data)[-tarfile.BLOCKSIZE :]
        return data

    def check_end(self) -> None:
        """Read to the end, which is an empty block.

        Raises:
            tarfile.ReadError: it is not; or EOFError of an archive whose packing ends too early.
        """
        while self.read(1 << 20):
            pass
        if self._size % tarfile.BLOCKSIZE or len(self._tail) < tarfile.BLOCKSIZE or any(self._tail):
            raise tarfile.ReadError("it has no end")


def _samples(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample: what follows the first dot of a name -> the bytes."""
    last: str | None = None
    members: dict[str, bytes] = {}
    for member in archive:
        if not member.isfile() or Path(member.name).name.startswith("."):
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        key = f"{folder}/{stem}"
        if last is not None and key != last:
            yield last, members
            members = {}
        last = key
        if member.size > _LARGEST:
            raise DataError(f"{path}: {shown(member.name)} has {member.size} bytes; allowed: {_LARGEST}")
        stream = archive.extractfile(member)
        members[kind.lower()] = stream.read() if stream is not None else b""
    if last is not None:
        yield last, members


def _row(path: Path, number: int, key: str, members: Mapping[str, bytes]) -> RawRow:
    """One sample as a row, or the problem with it."""
    name = key.rpartition("/")[2]
    try:
        row = _described(members)
        pictures = {
            f"{name}.{kind}": {"bytes": data, "path": f"{name}.{kind}"}
            for kind, data in sorted(members.items())
            if kind.rpartition(".")[2] in _PICTURES
        }
        if pictures:
            _place(row, pictures)
    except RowError as error:
        return RawRow(str(path), number, error)
    row.setdefault("id", key.removeprefix("/"))
    return as_row(str(path), number, row)


def _described(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The columns of a sample, its pictures left out."""
    row: dict[str, Any] = {}
    if "json" in members:
        try:
            row = json.loads(members["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise RowError(
                "malformed-json", "json", f"not JSON in UTF-8 ({str(error)[:120]})", "repair the sample"
            ) from None
        if not isinstance(row, dict):
            raise RowError(
                "not-an-object", "json", f"{type(row).__name__} in .json", "write an object with keys"
            )
    for kind, data in members.items():
        ending = kind.rpartition(".")[2]
        if kind == "json" or ending in _PICTURES:
            continue
        if ending in _VIDEOS | _AUDIOS:
            row.setdefault("videos" if ending in _VIDEOS else "audios", []).append(
                f"{len(data)} bytes of {kind}"
            )
        elif ending in _TEXTS:
            text = _text(kind, data)
            row |= {kind: text} if "json" in members else {"captions": [*row.get("captions", ()), text]}
        else:
            row.setdefault(kind, _text(kind, data) if len(data) < 1 << 16 else f"{len(data)} bytes")
    return row


def _text(kind: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        if kind.rpartition(".")[2] in _TEXTS:
            raise RowError("bad-text", kind, "not UTF-8", "repair the encoding") from None
        return f"{len(data)} bytes"


def _place(row: dict[str, Any], pictures: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the pictures into the row: where its JSON names them, else all of them in the order of their names."""
    key = next((k for k in IMAGE_KEYS if present(row.get(k))), None)
    if key is None:
        every = list(pictures.values())
        row |= {"image": every[0]} if len(every) == 1 else {"images": every}
        return
    values = row[key] if isinstance(row[key], list) else [row[key]]
    if not all(isinstance(value, str) and Path(value).name in pictures for value in values):
        raise RowError(
            "image-missing",
            key,
            f"the sample's .json names {shown(row[key], 60)}, its pictures are {', '.join(pictures)[:200]}",
            "name the members, or leave the column out: then all pictures of the sample are taken",
        )
    taken = [pictures[Path(value).name] for value in values]
    row[key] = taken if isinstance(row[key], list) else taken[0]
