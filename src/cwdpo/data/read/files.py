"""Raw rows of one file: lines, a list or a table, possibly compressed with gzip; ``tar.py`` reads WebDataset shards."""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cwdpo.data.problems import RowError
from cwdpo.data.read.packed import GZIP, kind_of, open_bytes
from cwdpo.data.read.source import RawRow, Source, as_row
from cwdpo.data.read.tar import tar_rows
from cwdpo.errors import DataError

LINES, LIST, TABLE, SHARD = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".tar", ".tgz")
SUFFIXES = (*LINES, *LIST, *TABLE, *SHARD, *(one + GZIP for one in (*LINES, *LIST, ".tar")))
_PARQUET_BATCH = 64  # rows; they may contain images


def file_source(path: Path) -> Source:
    """The source of one file.

    Raises:
        DataError: the suffix is not supported.
    """
    readers: dict[tuple[str, ...], Callable[[Path], Iterator[RawRow]]] = {
        LINES: _line_rows,
        LIST: _list_rows,
        TABLE: _table_rows,
        SHARD: tar_rows,
    }
    for suffixes, reader in readers.items():
        packed = path.suffix.lower() == GZIP
        if kind_of(path) in suffixes and not (packed and kind_of(path) in (*TABLE, ".tgz")):
            return Source(str(path), path.parent, partial(reader, path), (path,))
    raise DataError(
        f"{path}: cannot read {path.suffix or 'a file without suffix'}; allowed: {', '.join(SUFFIXES)}"
    )


def _line_rows(path: Path) -> Iterator[RawRow]:
    number = 0
    try:
        with open_bytes(path) as stream:
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
                    yield as_row(str(path), number, value, line.strip().removeprefix(codecs.BOM_UTF8))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(_unreadable(path, error, number)) from None


def _list_rows(path: Path) -> Iterator[RawRow]:
    try:
        with open_bytes(path) as stream:
            values = json.loads(stream.read().decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(_unreadable(path, error, 0)) from None
    except (ValueError, RecursionError) as error:
        hint = "; a file with one object per line must be called .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path}: not JSON in UTF-8 ({str(error)[:120]}){hint}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: holds {type(values).__name__}; allowed: a list of objects")
    for number, value in enumerate(values, start=1):
        yield as_row(str(path), number, value)


def _unreadable(path: Path, error: Exception, row: int) -> str:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    after = f" after row {row}: fetch the file again" if row else ""
    return f"{path}: cannot be read ({why}){after}"


def _table_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield as_row(str(path), number, value)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as parquet after row {number} ({str(error)[:200]})") from None
