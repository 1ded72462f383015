"""Raw rows, one at a time, from files, folders and the hub; what they mean is the business of formats."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cwdpo.data.problems import RowError
from cwdpo.data.read.dataset_info import Entry, registry_entry
from cwdpo.errors import DataError

LINES, LIST, TABLE = (".jsonl", ".ndjson"), (".json",), (".parquet",)
SUFFIXES = LINES + LIST + TABLE
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SHARD = re.compile(r"(?P<stem>.+?)-(?P<index>\d{5})-of-(?P<total>\d{5})")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")
_PARQUET_BATCH = 64  # rows; they may carry whole images


@dataclass(frozen=True)
class RawRow:
    """A row as stored, or the reason why it cannot be understood as one.

    ``line`` is its line in a ``.jsonl`` file, without the line feed.
    """

    file: str
    number: int
    value: dict[str, Any] | RowError
    line: bytes | None = None


@dataclass(frozen=True)
class Source:
    """Where rows come from. ``folder`` is where image paths start from; ``None`` for the hub.

    ``files`` are the data files that are read, one after the other; none for folders of ``save_to_disk``. ``format`` is
    what a registry says of them.
    """

    name: str
    folder: Path | None
    rows: Callable[[], Iterator[RawRow]]
    files: tuple[Path, ...] = ()
    format: str = "auto"


def iter_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """``(row number from 1, row)`` for every row, streaming (a ``.json`` list alone is read whole).

    ``path`` is a ``.jsonl``, ``.json`` or ``.parquet`` file; a folder with a ``.jsonl`` or ``.parquet`` file
    (``train`` or ``captions`` go first), with parquet shards, or written by ``datasets``' ``save_to_disk``;
    an entry of LLaMA-Factory's registry, ``FOLDER/dataset_info.json:NAME``;
    or, where no such path exists, a hub id ``owner/name``. Of several splits ``train`` is read. Each shard
    counts from 1.

    Raises:
        DataError: nothing there, several candidates, or a row that is no JSON object.
    """
    for row in open_source(path).rows():
        if isinstance(row.value, RowError):
            raise DataError(f"{row.value.at(row.file, row.number)}; {row.value.remedy}")
        yield row.number, row.value


def rows_source(rows: Iterable[Mapping[str, Any]], name: str) -> Source:
    """Rows that are already in memory: a list of dicts, or a ``datasets.Dataset``."""
    return Source(name, None, lambda: (RawRow(name, i, dict(row)) for i, row in enumerate(rows, 1)))


def open_source(path: str | Path) -> Source:
    """The source behind ``path`` (see :func:`iter_rows`); rows are read when iterated."""
    if entry := registry_entry(str(path)):
        return _described(open_source(entry.place), entry, str(path))
    place = Path(path)
    try:
        is_file, is_folder = place.is_file(), place.is_dir()
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)[:200]!r} cannot be a path: {error}") from None
    if is_file:
        return _file_source(place)
    if is_folder:
        return _folder_source(place)
    if _HUB_ID.fullmatch(str(path)) and place.suffix.lower() not in SUFFIXES:
        return Source(str(path), None, lambda: _hub_rows(str(path)))
    raise DataError(
        f"there is no file or folder {str(path)!r}; allowed: a {', '.join(SUFFIXES)} file, "
        "a folder with one, or the hub id of a data set (owner/name)"
    )


def _described(source: Source, entry: Entry, name: str) -> Source:
    """A source whose rows come under the names that a registry gives their columns."""

    def rows() -> Iterator[RawRow]:
        for raw in source.rows():
            value = raw.value if isinstance(raw.value, RowError) else entry.renamed(raw.value)
            yield replace(raw, value=value, line=None)

    # Image paths start from the registry's folder, as in LLaMA-Factory; the files' own columns are not to be read.
    return Source(name, entry.folder, rows, format="llamafactory")


def _file_source(path: Path) -> Source:
    readers: dict[tuple[str, ...], Callable[[Path], Iterator[RawRow]]] = {
        LINES: _line_rows,
        LIST: _list_rows,
        TABLE: _table_rows,
    }
    for suffixes, reader in readers.items():
        if path.suffix.lower() in suffixes:
            return Source(str(path), path.parent, partial(reader, path), (path,))
    raise DataError(
        f"{path}: cannot read {path.suffix or 'a file without suffix'}; allowed: {', '.join(SUFFIXES)}"
    )


def _folder_source(folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(str(folder), folder, lambda: _saved_rows(folder))
    files = _data_files(folder)
    if not files and (folder / "data").is_dir():  # a snapshot of a hub repository
        files = _data_files(folder / "data")
    if not files:
        raise DataError(
            f"{folder}: no data here; looked for *{', *'.join(LINES + TABLE)} and the files of "
            "save_to_disk; name the file to read"
        )
    preferred = [f for f in files if _stem(f) in ("train", "captions")]
    return _one_set(folder, preferred or files)


def _data_files(folder: Path) -> list[Path]:
    # dataset_info.json and the like describe data; a lone .json list must be named itself.
    return sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in LINES + TABLE)


def _stem(file: Path) -> str:
    shard = _SHARD.fullmatch(file.stem)
    return shard["stem"] if shard else file.stem


def _one_set(folder: Path, files: list[Path]) -> Source:
    """One file, or all shards of one table."""
    if len(files) == 1 and not _SHARD.fullmatch(files[0].stem):
        return _file_source(files[0])
    shards = [_SHARD.fullmatch(f.stem) for f in files]
    sets = {(s["stem"], f.suffix.lower(), s["total"]) if s else f for f, s in zip(files, shards, strict=True)}
    if len(sets) > 1:
        names = ", ".join(f.name for f in files[:8]) + (", ..." if len(files) > 8 else "")
        raise DataError(f"{folder}: several data files ({names}); name the one to read")
    present = {int(s["index"]) for s in shards if s}
    total = next(int(s["total"]) for s in shards if s)
    missing = sorted(set(range(total)) - present)
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {total} shards of {_stem(files[0])!r} are missing "
            f"(the first: {missing[0]:05d}); fetch them, or name the one file to read"
        )

    def rows() -> Iterator[RawRow]:
        for file in files:
            yield from _file_source(file).rows()

    return Source(str(folder), files[0].parent, rows, tuple(files))


def count_rows(source: Source) -> int | None:
    """Rows of a source, for a progress bar (blank lines count too); ``None`` where counting is no cheaper."""
    total = 0
    for file in source.files:
        try:
            if file.suffix.lower() in LINES:
                with file.open("rb") as stream:
                    total += sum(chunk.count(b"\n") for chunk in iter(partial(stream.read, 1 << 20), b""))
            elif file.suffix.lower() in TABLE:
                import pyarrow.parquet as pq

                total += pq.read_metadata(file).num_rows
            else:
                return None
        except (OSError, ValueError):  # reading it will say why
            return None
    return total or None


def held_out_beside(source: Source) -> list[Source]:
    """Validation and test sets in the folder of a source that is called ``train``."""
    if not source.files or _stem(source.files[0]).lower() != "train":
        return []
    folder = source.files[0].parent
    named: dict[str, list[Path]] = {}
    for file in _data_files(folder):
        if _stem(file).lower() in HELD_OUT:
            named.setdefault(_stem(file), []).append(file)
    return [_one_set(folder, files) for files in named.values()]


def _as_row(file: str, number: int, value: Any, line: bytes | None = None) -> RawRow:
    if isinstance(value, dict):
        return RawRow(file, number, value, line)
    error = RowError(
        "not-an-object",
        "",
        f"{type(value).__name__} where an object with keys belongs",
        'write each row as {"key": value, ...}',
    )
    return RawRow(file, number, error)


def _line_rows(path: Path) -> Iterator[RawRow]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    problem = RowError(
                        "malformed-json",
                        "",
                        f"the line is not JSON in UTF-8 ({str(error)[:120]})",
                        "write one JSON object per line",
                    )
                    yield RawRow(str(path), number, problem)
                else:
                    yield _as_row(str(path), number, value, line.strip().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _list_rows(path: Path) -> Iterator[RawRow]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        hint = "; a file with one object per line must be called .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path}: not JSON in UTF-8 ({str(error)[:120]}){hint}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: holds {type(values).__name__}; allowed: a list of objects")
    for number, value in enumerate(values, start=1):
        yield _as_row(str(path), number, value)


def _table_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield _as_row(str(path), number, value)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as parquet after row {number} ({str(error)[:200]})") from None


def _saved_rows(folder: Path) -> Iterator[RawRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"{folder}: datasets cannot load this folder ({str(error)[:300]})") from None
    yield from _dataset_rows(str(folder), loaded)


def _hub_rows(name: str) -> Iterator[RawRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, permissions, several configurations, ...
        raise DataError(
            f"there is no file or folder {name!r} here, and the hub did not give such a data set "
            f"({type(error).__name__}: {str(error)[:300]})"
        ) from None
    yield from _dataset_rows(name, loaded)


def _dataset_rows(name: str, loaded: Any) -> Iterator[RawRow]:
    import datasets

    if isinstance(loaded, dict):
        splits: Iterable[str] = loaded.keys()
        split = "train" if "train" in loaded else next(iter(splits), "")
        if not loaded or (split != "train" and len(loaded) > 1):
            raise DataError(
                f"{name}: has no split 'train' but {', '.join(splits) or 'none at all'}; save one of them"
            )
        name, loaded = f"{name}[{split}]", loaded[split]
    for column, feature in loaded.features.items():
        # Encoded bytes instead of decoded pictures: smaller, and nothing is compressed twice.
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.List(datasets.Image(decode=False)))
    for number, value in enumerate(loaded, start=1):
        yield _as_row(name, number, value)
