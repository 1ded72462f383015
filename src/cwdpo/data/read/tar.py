"""WebDataset's shards: tar files in which the members with the same name are a row."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from cwdpo.data.columns import IMAGE_KEYS, VIDEO_KEYS, present
from cwdpo.data.problems import RowError, shown
from cwdpo.data.read.packed import open_bytes
from cwdpo.data.read.source import RawRow, as_row
from cwdpo.errors import DataError

_PICTURES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"}
_VIDEOS, _AUDIOS = {"mp4", "mkv", "avi", "mov", "webm"}, {"wav", "mp3", "flac", "ogg", "m4a"}
_TEXTS = {"txt", "text", "caption"}
_LARGEST = 1 << 30  # largest size of a member, in bytes


def tar_rows(path: Path) -> Iterator[RawRow]:
    """One row for each sample of a shard: its ``.json``, with the images of the same name.

    As in WebDataset, a member's file name up to its first dot is the key of the sample, the rest is the kind of the
    member, and the members of a sample follow each other. Images become ``image`` (one) or ``images`` (several, sorted
    by name), videos ``video`` or ``videos``; if the JSON names them, the names are replaced by the members. A ``.txt``
    without a JSON becomes ``captions``. Audio becomes ``audios``; other members become columns with the name of their
    kind.

    Raises:
        DataError: the file is not a tar, or it is truncated.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            stream = _Watched(file)
            # Read as a stream: members in their order, without following links or opening devices.
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
    """A stream that checks the end of a tar: ``tarfile`` does not notice if a tar is truncated."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._tail = file, 0, b""

    def read(self, n: int) -> bytes:
        """The next bytes."""
        data = self._file.read(n)
        self._size += len(data)
        self._tail = (self._tail + data)[-tarfile.BLOCKSIZE :]
        return data

    def check_end(self) -> None:
        """Read to the end, which must be an empty block.

        Raises:
            tarfile.ReadError: the end is missing. EOFError: the compressed data are truncated.
        """
        while self.read(1 << 20):
            pass
        if self._size % tarfile.BLOCKSIZE or len(self._tail) < tarfile.BLOCKSIZE or any(self._tail):
            raise tarfile.ReadError("it has no end")


def _samples(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample; members by their kind, the part of the name after its first dot."""
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
    """One sample as a row, or its error."""
    name = key.rpartition("/")[2]
    try:
        row = _described(members)
        for endings, keys, medium in ((_PICTURES, IMAGE_KEYS, "image"), (_VIDEOS, VIDEO_KEYS, "video")):
            files = {
                f"{name}.{kind}": {"bytes": data, "path": f"{name}.{kind}"}
                for kind, data in sorted(members.items())
                if kind.rpartition(".")[2] in endings
            }
            if files:
                _place(row, files, keys, medium)
    except RowError as error:
        return RawRow(str(path), number, error)
    row.setdefault("id", key.removeprefix("/"))
    return as_row(str(path), number, row)


def _described(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The columns of a sample without its images and videos."""
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
        if kind == "json" or ending in _PICTURES | _VIDEOS:
            continue
        if ending in _AUDIOS:
            row.setdefault("audios", []).append(f"{len(data)} bytes of {kind}")
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


def _place(
    row: dict[str, Any], files: Mapping[str, Mapping[str, Any]], keys: Sequence[str], medium: str
) -> None:
    """Put the images or videos into the row: in place of their names in the JSON, or else all, sorted by name."""
    key = next((k for k in keys if present(row.get(k))), None)
    if key is None:
        every = list(files.values())
        row |= {medium: every[0]} if len(every) == 1 else {f"{medium}s": every}
        return
    values = row[key] if isinstance(row[key], list) else [row[key]]
    if not all(isinstance(value, str) and Path(value).name in files for value in values):
        raise RowError(
            f"{medium}-missing",
            key,
            f"the sample's .json names {shown(row[key], 60)}, its {medium}s are {', '.join(files)[:200]}",
            f"name the members, or leave the column out: then all {medium}s of the sample are taken",
        )
    taken = [files[Path(value).name] for value in values]
    row[key] = taken if isinstance(row[key], list) else taken[0]
