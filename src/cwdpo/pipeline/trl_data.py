"""Data sets in the forms that TRL accepts: ``datasets`` objects, dictionaries of them, streams, lists of rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cwdpo.data.read.hub import dataset_rows
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.data.read.source import Source
from cwdpo.errors import DataError
from cwdpo.records import Example

logger = logging.getLogger("cwdpo")
Rows = Iterable[Mapping[str, Any]]
EvalRows = Rows | Mapping[str, Rows]


def training_rows(rows: Any, *, has_eval: bool) -> Rows:
    """The rows to train on; for a DatasetDict, its split ``train``.

    Args:
        rows: the ``train_dataset`` argument.
        has_eval: whether an ``eval_dataset`` is given.

    Raises:
        DataError: there are no rows, or the use of several splits is not clear.
    """
    if rows is None:
        raise DataError("CWDPOTrainer: train_dataset is missing: pass rows in TRL's preference format")
    if not isinstance(rows, Mapping):
        return _checked(rows, "train_dataset")
    splits = list(rows)
    others = [name for name in splits if name != "train"]
    if "train" not in rows or (others and not has_eval):
        raise DataError(
            f"train_dataset has the splits {', '.join(map(str, splits)) or 'none'}: pass one of them, as in "
            f"train_dataset=dataset[{(splits or ['train'])[0]!r}]"
            + (f", eval_dataset=dataset[{others[0]!r}]" if others else "")
        )
    return _checked(rows["train"], "train_dataset['train']")


def evaluation_rows(rows: Any) -> dict[str, Rows]:
    """The evaluation sets by name; a single set has the name ``""``."""
    if rows is None:
        return {}
    if isinstance(rows, Mapping):
        return {str(name): _checked(one, f"eval_dataset[{name!r}]") for name, one in rows.items()}
    return {"": _checked(rows, "eval_dataset")}


def _checked(rows: Any, name: str) -> Rows:
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise DataError(
            f"{name}: {type(rows).__name__}; allowed: a datasets.Dataset, a stream of one, or a list of rows (dicts)"
        )
    return rows


def is_stream(rows: Rows) -> bool:
    """Whether the rows are a stream of unknown length (``datasets.IterableDataset``)."""
    return hasattr(rows, "with_format") and not hasattr(rows, "__len__")


def examples_of(
    rows: Rows, name: str, max_bad_fraction: float, limit: int | None = None
) -> Sequence[Example]:
    """The usable examples of rows, in their order; notes about the data are logged as warnings.

    Args:
        rows: the rows.
        name: name of the argument, for messages.
        max_bad_fraction: share of rows that may be unusable.
        limit: largest number of examples to read (for streams).

    Raises:
        DataError: too many rows are bad, or none can be used.
    """
    result = read_examples(_source(rows, name), max_bad_fraction=max_bad_fraction, limit=limit)
    for note in result.notes:
        logger.warning("%s", note)
    return result.examples


def _source(rows: Rows, name: str) -> Source:
    form = getattr(rows, "format", None)
    custom = (
        isinstance(form, Mapping) and form.get("type") == "custom"
    )  # the user has set a transform, which must be applied
    if hasattr(rows, "with_format") and not custom:
        return Source(name, None, lambda: dataset_rows(name, rows, embed=True))
    return rows_source(rows, name)
