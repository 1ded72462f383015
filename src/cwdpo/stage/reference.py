"""The reference pass of a run: reads log-likelihoods from the cache, and scores and stores those that are missing."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import nn

from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.encode.reading import read_ahead
from cwdpo.errors import CwdpoError, DataError, NonFiniteError, ReferenceCacheError
from cwdpo.models.quantization import is_rounded
from cwdpo.models.turns import in_turns
from cwdpo.models.vision_cache import needs_images
from cwdpo.rundir import RunDir
from cwdpo.scoring.pairs import reference_pass, with_reference
from cwdpo.scoring.reference_cache import (
    CacheWriter,
    ReferenceValues,
    Value,
    differs,
    reference_digest,
    row_keys,
)
from cwdpo.waiting import from_first, of_all

FOLDER = "reference"
CANARIES = 4
"""Number of examples whose stored values are checked against the reference model before the cache is used."""


def stored_reference_pass(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    run: RunDir,
    *,
    batch_size: int,
    bf16: bool = False,
    folder: Path | None = None,
) -> Sequence[EncodedExample]:
    """Like :func:`cwdpo.scoring.pairs.reference_pass`, but scores only the completions that the cache lacks.

    Several processes share the work; the main one reads and writes the cache. The batches do not depend on what is
    stored, and each is stored completely. So a resumed run gets the same values, bit for bit.

    Args:
        model: the reference model.
        examples: the examples to score.
        run: the run; only a process with ``run.writes`` stores values.
        batch_size: prompts per forward pass.
        bf16: whether the caller scores under bfloat16 autocast.
        folder: folder of the cache, shared between runs; default: ``reference/`` in the run folder.

    Returns:
        The examples with reference values (nats), in the same order.

    Raises:
        NonFiniteError, ReferenceCacheError: a value is not finite; a stored value is damaged or no longer right.
        DataError: an image cannot be read, on any process.
    """
    state = PartialState()
    digest = reference_digest(model, bf16=bf16)
    rows = _Keyed(examples, digest)
    folder = folder or run.path / FOLDER
    _read_stored(folder, model, rows, rounded=bf16 or is_rounded(model))
    writer = CacheWriter(folder)
    order = np.argsort(_longest(examples), kind="stable")
    size = batch_size * state.num_processes
    groups = range(0, len(order), size)
    wanted = partial(needs_images, model)

    def own(group: int) -> Any:
        """The rows of this process in a group of batches that begins here; may be empty."""
        first = group + state.process_index * batch_size
        return order[first : min(first + batch_size, group + size)]

    def begun(index: Any) -> list[tuple[int, EncodedExample]]:
        """The examples of a batch; the images of those that must be scored are read from now on."""
        known = (rows.values.known(rows.slots(i)).all() for i in index)
        return [
            (i, examples[i] if has else examples[i].ahead(wanted))
            for i, has in zip(index.tolist(), known, strict=True)
        ]

    for batch in read_ahead(map(own, groups), begun, len):
        scored = _of_all(model, rows, batch)
        if run.writes:
            writer.append(rows.values.by_key(scored))
        rows.values.put(scored)
    writer.close()
    return _with_values(examples, rows)


class _Keyed:
    """Examples with the keys of their completions, and the values that are known.

    Args:
        examples: the examples.
        digest: of the reference model.
    """

    def __init__(self, examples: Sequence[EncodedExample], digest: str) -> None:
        self.examples = examples
        keys, counts = bytearray(), array("q")
        for example in examples:
            own = row_keys(digest, example)
            keys += b"".join(own)
            counts.append(len(own))
        self.first: Any = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.asarray(counts))])
        """[B + 1] number of the first completion of each example."""
        self.values = ReferenceValues(keys)

    def slots(self, row: int) -> Any:
        """Where the values of an example's completions are."""
        return self.values.slots[self.first[row] : self.first[row + 1]]

    def stored(self, row: int) -> list[Value]:
        """The values of an example's completions."""
        return [(total, span) for total, span in self.values.values(self.slots(row)).tolist()]


def _longest(examples: Sequence[EncodedExample]) -> Any:
    """[B] tokens of the longest sequence of each example."""
    if isinstance(examples, EncodedRows):
        return examples.row_sizes(shared=False)[1]
    return np.fromiter((e.n_tokens for e in examples), dtype=np.int64, count=len(examples))


def _with_values(examples: Sequence[EncodedExample], rows: _Keyed) -> Sequence[EncodedExample]:
    if isinstance(examples, EncodedRows):
        return examples.with_reference(examples.of_all_completions(rows.values.values(rows.values.slots)))
    return [with_reference(example, rows.stored(i)) for i, example in enumerate(examples)]


def _read_stored(folder: Path, model: nn.Module, rows: _Keyed, *, rounded: bool) -> None:
    """Take over the stored values. The main process reads them; its error is raised on all processes."""
    error = ""
    with in_turns(model):
        if PartialState().is_main_process:
            try:
                rows.values.fill(folder)
                _check_canaries(folder, model, rows, rounded=rounded)
            except (ReferenceCacheError, NonFiniteError) as problem:
                error = str(problem)
    rows.values.state, error = from_first((rows.values.state, error), "reading stored reference values")
    if error:
        raise ReferenceCacheError(error)


def _of_all(model: nn.Module, rows: _Keyed, batch: Sequence[tuple[int, EncodedExample]]) -> dict[int, Value]:
    """What :func:`_missing` gives on every process, joined; what one raises is raised on all, or they would wait."""
    scored: dict[int, Value] = {}
    problem: tuple[type[CwdpoError], str] | None = None
    try:
        with in_turns(model):
            scored = _missing(model, rows, batch)
    except (NonFiniteError, DataError) as error:
        problem = NonFiniteError if isinstance(error, NonFiniteError) else DataError, str(error)
    parts = of_all([(scored, problem)], "the reference pass")
    for _, failed in parts:
        if failed is not None:
            raise failed[0](failed[1])
    return {slot: value for part, _ in parts for slot, value in part.items()}


def _missing(model: nn.Module, rows: _Keyed, batch: Sequence[tuple[int, EncodedExample]]) -> dict[int, Value]:
    """Score those completions of one batch that have no value, by slot."""
    wanted: list[EncodedExample] = []
    places: list[list[int]] = []
    for row, example in batch:
        slots = rows.slots(row)
        lacking = np.flatnonzero(~rows.values.known(slots))
        if len(lacking):
            first, *rest = (example.completions[k] for k in lacking)
            wanted.append(replace(example, chosen=first, negatives=tuple(rest)))
            places.append(slots[lacking].tolist())
    if not wanted:
        return {}
    found: dict[int, Value] = {}
    scored = reference_pass(model, wanted, batch_size=len(wanted))
    for example, own in zip(scored, places, strict=True):
        found |= zip(own, _finite_values(example), strict=True)
    return found


def _finite_values(example: EncodedExample) -> list[Value]:
    """(sum_logp, span_sum_logp) of chosen, then of each negative."""
    values: list[Value] = []
    for completion in example.completions:
        total, span = completion.reference_sum_logp, completion.reference_span_sum_logp
        assert total is not None
        assert span is not None
        if not (math.isfinite(total) and math.isfinite(span)):
            raise NonFiniteError(
                f"example {example.id}: the log-likelihood of a response under the reference is {total}; nothing "
                "was trained. Check its image and texts with `cwdpo validate`, or the model's weights"
            )
        values.append((total, span))
    return values


def _check_canaries(folder: Path, model: nn.Module, rows: _Keyed, *, rounded: bool) -> None:
    """Score a few examples again whose values are all stored, and compare.

    Raises:
        ReferenceCacheError: the reference model gives other values now.
    """
    if not len(rows.examples):
        return
    known = rows.values.known(rows.values.slots)
    stored = np.flatnonzero(np.logical_and.reduceat(known, rows.first[:-1])).tolist()
    for i in stored[:: max(1, len(stored) // CANARIES)][:CANARIES]:
        example = rows.examples[i]
        now = _finite_values(reference_pass(model, [example])[0])
        old = rows.stored(i)
        wrong = differs(old, now, [len(c.ids) for c in example.completions], rounded=rounded)
        if wrong is not None:
            raise ReferenceCacheError(
                f"{folder}: stale: for example {example.id}, response {wrong}, the stored log-likelihood is "
                f"{old[wrong][0]:.4f}, but the reference gives {now[wrong][0]:.4f} now (another machine or other "
                "kernels?); delete the folder, or name another one in train.reference_cache"
            )
