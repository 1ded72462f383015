"""Rows of data sets of the ``datasets`` library: folders of ``save_to_disk``, and the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cwdpo.data.read.source import RawRow, as_row
from cwdpo.errors import DataError
from cwdpo.hub import ADDRESS, HubData, check_hub

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


def hub_rows(place: HubData, *, streaming: bool = False) -> Iterator[RawRow]:
    """Rows of a data set on the hub: of the split that is named, else of ``train``.

    Args:
        place: the data set.
        streaming: read its files while the rows are read, instead of fetching them first.

    Raises:
        DataError: the hub has no such data set, revision, configuration or split, or does not answer within seconds;
            or, with ``streaming``, it does not answer any more.
    """
    import datasets

    if streaming and "[" in (place.split or ""):
        raise DataError(
            f"{place}: a part of a split cannot be streamed: leave out {'[' + str(place.split).partition('[')[2]}"
        )
    check_hub(place.id, "datasets", place.revision, DataError)
    try:
        loaded = datasets.load_dataset(
            place.id, place.config, revision=place.revision, split=place.split, streaming=streaming
        )
    except Exception as error:  # network, no such configuration or split, ...
        raise DataError(f"{place}: {_lacking(place, error)}") from None
    if isinstance(loaded, dict) and len(loaded) > 1 and "train" not in loaded:
        raise DataError(f"{place}: {_one_of('splits', loaded, '#')}")
    number = 0
    try:
        for row in dataset_rows(str(place), loaded):
            yield row
            number = row.number
    except Exception as error:  # of the network, of a file's reader, ...
        if not streaming or isinstance(error, DataError):
            raise
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{place}: no more rows after row {number} ({type(error).__name__}: {said}); a run that was streaming them "
            "continues with --resume"
        ) from error


def _lacking(place: HubData, error: Exception) -> str:
    """Which configuration or split there is instead; else what ``datasets`` said."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(place.id, revision=place.revision)
        if place.config not in configs and (place.config is not None or len(configs) > 1):
            return _one_of("configurations", configs, ":")
        splits = datasets.get_dataset_split_names(place.id, place.config, revision=place.revision)
        if place.split is not None and place.split.partition("[")[0] not in splits:
            return _one_of("splits", splits, "#")
    except Exception as further:  # as above
        error = further
    said = " ".join(str(error).split())[:300]
    return (
        f"datasets cannot load it ({type(error).__name__}: {said}); with HF_HUB_OFFLINE=1 only what was fetched before "
        "is there"
    )


def _one_of(what: str, names: Iterable[str], mark: str) -> str:
    listed = list(names)
    shown = ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "")
    return f"it has the {what} {shown}: name one, as in {ADDRESS} (here {mark}{listed[0]})"


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
    import datasets

    number = 0
    if isinstance(loaded, datasets.IterableDataset) and not embed:
        # Where `datasets` makes tables of single rows (WebDataset), it cannot join them: their columns differ in order.
        for value in loaded.decode(False):
            number += 1
            yield as_row(name, number, value)
        return
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
