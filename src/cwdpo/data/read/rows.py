"""Raw rows, one at a time, from files, folders and the hub; the formats interpret them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cwdpo.data.problems import RowError, shown
from cwdpo.data.read.dataset_info import Entry, registry_entry
from cwdpo.data.read.files import LINES, SHARD, SUFFIXES, TABLE, file_source
from cwdpo.data.read.hub import hub_rows, saved_rows
from cwdpo.data.read.internvl import registry_source
from cwdpo.data.read.packed import GZIP, bare_name, kind_of
from cwdpo.data.read.source import RawRow, Source
from cwdpo.errors import DataError
from cwdpo.hub import ADDRESS, hub_data

_IN_FOLDERS = LINES + TABLE + SHARD
_SHARD = re.compile(r"(?P<stem>.+?)-(?P<index>\d{5})-of-(?P<total>\d{5})")
_TAR_SHARD = re.compile(r"(?P<stem>.*?)[-_.]?(?P<index>\d+)")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")


def iter_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """``(row number from 1, row)`` for every row. Rows are streamed; only a ``.json`` list is read completely.

    ``path`` may be: a ``.jsonl``, ``.json``, ``.parquet`` or ``.tar`` (WebDataset) file, all but ``.parquet`` also as
    ``.gz``; a folder with such a file (``train`` or ``captions`` is preferred), with shards, or written by
    ``save_to_disk`` of ``datasets``; shards as ``FOLDER/*.tar``; an entry of LLaMA-Factory's registry,
    ``FOLDER/dataset_info.json:NAME``; InternVL's registry, ``META.json`` or ``META.json:NAME``; or, if there is no such
    path, a data set of the hub, ``owner/name[@revision][:configuration][#split]``. If there are several splits and none
    is named, ``train`` is read. Each shard counts from 1.

    Raises:
        DataError: there is no such data, there are several candidates, or a row is not a JSON object.
    """
    for row in open_source(path).rows():
        if isinstance(row.value, RowError):
            raise DataError(f"{row.value.at(row.file, row.number)}; {row.value.remedy}")
        yield row.number, row.value


def rows_source(rows: Iterable[Mapping[str, Any]], name: str) -> Source:
    """Rows that are already in memory: a list of dicts, or a ``datasets.Dataset``."""
    return Source(name, None, lambda: (RawRow(name, i, dict(row)) for i, row in enumerate(rows, 1)))


def open_source(path: str | Path, *, streaming: bool = False) -> Source:
    """The source of ``path`` (see :func:`iter_rows`); rows are read while iterating.

    With ``streaming``, a data set of the hub is not fetched first: its files are read as its rows are.
    """
    if entry := registry_entry(str(path)):
        return _described(open_source(entry.place, streaming=streaming), entry, str(path))
    place = Path(path)
    try:
        is_file, is_folder = place.is_file(), place.is_dir()
        shards = (
            [] if is_file or is_folder or "*" not in place.name else sorted(place.parent.glob(place.name))
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(str(path), 200)} cannot be a path: {error}") from None
    if registry := registry_source(str(path), file_source):
        return registry
    if shards:
        return _one_set(place.parent, shards)
    if is_file:
        return file_source(place)
    if is_folder:
        return _folder_source(place)
    hub = hub_data(str(path))
    if hub is not None and Path(hub.id).suffix.lower() not in SUFFIXES:
        return Source(str(path), None, lambda: hub_rows(hub, streaming=streaming))
    raise DataError(
        f"there is no file or folder {str(path)!r}; allowed: a {', '.join(SUFFIXES)} file, "
        f"a folder with one, or a data set of the hub ({ADDRESS})"
    )


def _described(source: Source, entry: Entry, name: str) -> Source:
    """A source whose columns are renamed as a registry says."""

    def rows() -> Iterator[RawRow]:
        for raw in source.rows():
            value = raw.value if isinstance(raw.value, RowError) else entry.renamed(raw.value)
            yield replace(raw, value=value, line=None)

    # Image paths are relative to the registry's folder, as in LLaMA-Factory. The format is fixed, because the files'
    # own columns must not decide it.
    return Source(name, entry.folder, rows, format="llamafactory")


def _folder_source(folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(str(folder), folder, lambda: saved_rows(folder))
    files = _data_files(folder)
    if not files and (folder / "data").is_dir():  # a snapshot of a hub repository
        files = _data_files(folder / "data")
    if not files:
        raise DataError(
            f"{folder}: no data here; looked for *{', *'.join(_IN_FOLDERS)} and the files of "
            "save_to_disk; name the file to read"
        )
    preferred = [f for f in files if _stem(f) in ("train", "captions")]
    return _one_set(folder, preferred or files)


def _data_files(folder: Path) -> list[Path]:
    # .json files in a folder are often descriptions such as dataset_info.json, so a .json list must be named itself.
    return sorted(f for f in folder.iterdir() if f.is_file() and kind_of(f) in _IN_FOLDERS)


def _shard(file: Path) -> re.Match[str] | None:
    """The parts of a shard's file name; names of tars need no total."""
    shard = _SHARD.fullmatch(bare_name(file))
    return shard if shard or kind_of(file) not in SHARD else _TAR_SHARD.fullmatch(bare_name(file))


def _stem(file: Path) -> str:
    shard = _shard(file)
    return shard["stem"] if shard else bare_name(file)


def _one_set(folder: Path, files: list[Path]) -> Source:
    """One file, or all shards of one table."""
    shards = [_shard(f) for f in files]
    if len(files) == 1 and (not shards[0] or kind_of(files[0]) in SHARD):
        return file_source(files[0])
    sets = {
        (s["stem"], kind_of(f), s.groupdict().get("total")) if s else f
        for f, s in zip(files, shards, strict=True)
    }
    if len(sets) > 1:
        names = ", ".join(f.name for f in files[:8]) + (", ..." if len(files) > 8 else "")
        raise DataError(f"{folder}: several data files ({names}); name the one to read")
    present = {int(s["index"]) for s in shards if s}
    total = next(s.groupdict().get("total") for s in shards if s)
    # Names of tars do not have the number of shards: those that exist must have consecutive numbers.
    expected = range(int(total)) if total else range(min(present), max(present) + 1)
    missing = sorted(set(expected) - present)
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(expected)} shards of {_stem(files[0])!r} are missing "
            f"(the first: {missing[0]:05d}); fetch them, or name the one file to read"
        )

    def rows() -> Iterator[RawRow]:
        for file in files:
            yield from file_source(file).rows()

    return Source(str(folder), files[0].parent, rows, tuple(files))


def first_rows(source: Source, n: int) -> Source:
    """The source of the first rows only."""
    return replace(source, rows=lambda: islice(source.rows(), n))


def count_rows(source: Source) -> int | None:
    """Number of rows, for a progress bar (blank lines are counted); ``None`` if counting would mean reading all."""
    total = 0
    for file in source.files:
        try:
            if kind_of(file) in LINES and file.suffix.lower() != GZIP:
                with file.open("rb") as stream:
                    total += sum(chunk.count(b"\n") for chunk in iter(partial(stream.read, 1 << 20), b""))
            elif file.suffix.lower() in TABLE:
                import pyarrow.parquet as pq

                total += pq.read_metadata(file).num_rows
            else:
                return None
        except (OSError, ValueError):  # reading the file reports the error
            return None
    return total or None


def held_out_beside(source: Source) -> list[Source]:
    """The validation and test sets next to a source with the name ``train``."""
    if not source.files or _stem(source.files[0]).lower() != "train":
        return []
    folder = source.files[0].parent
    named: dict[str, list[Path]] = {}
    for file in _data_files(folder):
        if _stem(file).lower() in HELD_OUT:
            named.setdefault(_stem(file), []).append(file)
    return [_one_set(folder, files) for files in named.values()]
