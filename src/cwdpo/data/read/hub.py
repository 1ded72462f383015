"""Rows of data sets of the ``datasets`` library: folders of ``save_to_disk``, and the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cwdpo.data.read.source import RawRow, as_row
from cwdpo.errors import DataError

_BATCH = 64  # rows; they may contain images


def saved_rows(folder: Path) -> Iterator[RawRow]:
    """Rows of a folder that ``save_to_disk`` wrote; if there are several splits, those of ``train``.

    Raises:
        DataError: ``datasets`` cannot load the folder, or it has several splits but no ``train``.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises many types of error
        raise DataError(f"{folder}: datasets cannot load this folder ({str(error)[:300]})") from None
    yield from dataset_rows(str(folder), loaded)


def hub_rows(name: str) -> Iterator[RawRow]:
    """Rows of a data set on the hub; splits as for :func:`saved_rows`.

    Raises:
        DataError: the hub does not answer or has no such data set.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, permissions, several configurations, ...
        raise DataError(
            f"there is no file or folder {name!r}, and the hub has no such data set or did not answer "
            f"({type(error).__name__}: {str(error)[:300]})"
        ) from None
    yield from dataset_rows(name, loaded)


def dataset_rows(name: str, loaded: Any, *, embed: bool = False) -> Iterator[RawRow]:
    """Rows of a ``datasets`` object; if there are several splits, those of ``train``.

    Args:
        name: name of the data set, for messages.
        loaded: the object.
        embed: whether to read files that its features name. Use it only for data sets that the caller has made,
            because a foreign data set could name any file.

    Raises:
        DataError: there are several splits but no ``train``.
    """
    if isinstance(loaded, dict):
        splits: Iterable[str] = loaded.keys()
        split = "train" if "train" in loaded else next(iter(splits), "")
        if not loaded or (split != "train" and len(loaded) > 1):
            raise DataError(
                f"{name}: has no split 'train' but {', '.join(splits) or 'none at all'}; save one of them"
            )
        name, loaded = f"{name}[{split}]", loaded[split]
    # Take the rows as Arrow stores them, so that `datasets` does not decode images, videos and audio. Encoded bytes are
    # smaller than decoded images, nothing is compressed twice, and only our own checks open them.
    number = 0
    for table in loaded.with_format("arrow").iter(batch_size=_BATCH):
        for value in (_embedded(table, name) if embed else table).to_pylist():
            number += 1
            yield as_row(name, number, value)


def _embedded(table: Any, name: str) -> Any:
    from datasets.table import embed_table_storage

    try:
        return embed_table_storage(table, remote_files=False)
    except Exception as error:  # a missing file, or storage that cannot be read
        raise DataError(
            f"{name}: a picture cannot be read ({type(error).__name__}: {str(error)[:200]})"
        ) from None
