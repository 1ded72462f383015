"""Data sets as TRL's users hand them over: ``datasets`` objects, dictionaries of them, streams, lists of rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
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
    """The rows to train on; of a DatasetDict those of ``train``.

    Raises:
        DataError: none were given, or several splits of which nobody says what they are for.
    """
    if rows is None:
        raise DataError("CWDPOTrainer: train_dataset is missing: give rows in TRL's preference format")
    if not isinstance(rows, Mapping):
        return _checked(rows, "train_dataset")
    splits = list(rows)
    others = [name for name in splits if name != "train"]
    if "train" not in rows or (others and not has_eval):
        raise DataError(
            f"train_dataset has the splits {', '.join(map(str, splits)) or 'none'}: give one of them, as in "
            f"train_dataset=dataset[{(splits or ['train'])[0]!r}]"
            + (f", eval_dataset=dataset[{others[0]!r}]" if others else "")
        )
    return _checked(rows["train"], "train_dataset['train']")


def evaluation_rows(rows: Any) -> dict[str, Rows]:
    """Evaluation sets by name; a single one has the name ``""``."""
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
    """Whether rows come one by one and nobody knows how many: ``datasets.IterableDataset``."""
    return hasattr(rows, "with_format") and not hasattr(rows, "__len__")


def examples_of(rows: Rows, name: str, max_bad_fraction: float, limit: int | None = None) -> list[Example]:
    """The usable examples of rows, in their order; what else should be known of them goes to the log.

    Args:
        limit: read no more than so many examples (of a stream).

    Raises:
        DataError: too many bad rows, or none that can be used.
    """
    result = read_examples(_source(rows, name), max_bad_fraction=max_bad_fraction, limit=limit)
    for note in result.notes:
        logger.warning("%s", note)
    return result.examples


def _source(rows: Rows, name: str) -> Source:
    form = getattr(rows, "format", None)
    custom = (
        isinstance(form, Mapping) and form.get("type") == "custom"
    )  # a user's own transform, to be applied
    if hasattr(rows, "with_format") and not custom:
        return Source(name, None, lambda: dataset_rows(name, rows, embed=True))
    return rows_source(rows, name)
