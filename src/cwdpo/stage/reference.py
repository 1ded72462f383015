"""The reference pass of a run: reads log-likelihoods from the cache, and scores and stores those that are missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from cwdpo.scoring.reference_cache import ReferenceCache, Value, differs, reference_digest, row_keys
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
    progress: Callable[[int], None] = lambda n: None,
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
        progress: called with the number of finished prompts.

    Returns:
        The examples with reference values (nats), in the same order.

    Raises:
        NonFiniteError, ReferenceCacheError: a value is not finite; a stored value is damaged or no longer right.
        DataError: an image cannot be read, on any process.
    """
    state = PartialState()
    digest = reference_digest(model, bf16=bf16)
    keys = [row_keys(digest, e) for e in examples]
    rounded = bf16 or is_rounded(model)
    cache = _opened(folder or run.path / FOLDER, model, examples, keys, rounded=rounded)
    order = sorted(range(len(examples)), key=lambda i: (examples[i].n_tokens, i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    groups = [batches[i : i + state.num_processes] for i in range(0, len(batches), state.num_processes)]
    own = [group[state.process_index] if state.process_index < len(group) else [] for group in groups]

    def begun(index: Sequence[int]) -> list[EncodedExample]:
        """The examples of a batch; the images of those that must be scored are read from now on."""
        lacking = {i for i in index if any(cache.get(key) is None for key in keys[i])}
        return [examples[i].ahead(wanted) if i in lacking else examples[i] for i in index]

    wanted = partial(needs_images, model)
    for group, index, rows in zip(groups, own, read_ahead(own, begun, len), strict=True):
        scored = _of_all(model, rows, [keys[i] for i in index], cache)
        if run.writes:
            cache.append(scored)
        cache.add(scored)
        for batch in group:
            progress(len(batch))
    cache.close()
    return _with_values(examples, keys, cache)


def _with_values(
    examples: Sequence[EncodedExample], keys: Sequence[Sequence[bytes]], cache: ReferenceCache
) -> Sequence[EncodedExample]:
    if isinstance(examples, EncodedRows):
        return examples.with_reference(_array(examples, keys, cache))
    return [
        with_reference(example, [_known(cache, key) for key in own])
        for example, own in zip(examples, keys, strict=True)
    ]


def _array(rows: EncodedRows, keys: Sequence[Sequence[bytes]], cache: ReferenceCache) -> Any:
    """The values of all completions of a file, [C, 2]; those of rows that are not selected are not a number."""
    values = np.full((len(rows.lengths), 2), np.nan)
    for row, own in zip(rows.index.tolist(), keys, strict=True):
        values[rows.first[row] : rows.first[row + 1]] = [_known(cache, key) for key in own]
    return values


def _opened(
    folder: Path,
    model: nn.Module,
    examples: Sequence[EncodedExample],
    keys: Sequence[Sequence[bytes]],
    *,
    rounded: bool,
) -> ReferenceCache:
    """The cache with the stored values of ``keys``. The main process reads it; its error is raised on all processes."""
    state = PartialState()
    cache = ReferenceCache(folder, read=False)
    found: dict[bytes, Value] = {}
    error = ""
    with in_turns(model):
        if state.is_main_process:
            try:
                cache = ReferenceCache(folder)
                found = {key: value for own in keys for key in own if (value := cache.get(key)) is not None}
                _check_canaries(model, examples, keys, cache, rounded=rounded)
            except (ReferenceCacheError, NonFiniteError) as problem:
                error = str(problem)
    found, error = from_first((found, error), "reading stored reference values")
    if error:
        raise ReferenceCacheError(error)
    cache.add(found)
    return cache


def _known(cache: ReferenceCache, key: bytes) -> Value:
    value = cache.get(key)
    assert value is not None
    return value


def _of_all(
    model: nn.Module,
    rows: Sequence[EncodedExample],
    keys: Sequence[Sequence[bytes]],
    cache: ReferenceCache,
) -> dict[bytes, Value]:
    """What :func:`_missing` gives on every process, joined; what one raises is raised on all, or they would wait."""
    scored: dict[bytes, Value] = {}
    problem: tuple[type[CwdpoError], str] | None = None
    try:
        with in_turns(model):
            scored = _missing(model, rows, keys, cache)
    except (NonFiniteError, DataError) as error:
        problem = NonFiniteError if isinstance(error, NonFiniteError) else DataError, str(error)
    parts = of_all([(scored, problem)], "the reference pass")
    for _, failed in parts:
        if failed is not None:
            raise failed[0](failed[1])
    return {key: value for part, _ in parts for key, value in part.items()}


def _missing(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    keys: Sequence[Sequence[bytes]],
    cache: ReferenceCache,
) -> dict[bytes, Value]:
    """Score those completions of one batch that the cache lacks."""
    wanted: list[EncodedExample] = []
    names: list[list[bytes]] = []
    for example, own in zip(examples, keys, strict=True):
        lacking = [(k, c) for k, c in zip(own, example.completions, strict=True) if cache.get(k) is None]
        if lacking:
            first, *rest = (c for _, c in lacking)
            wanted.append(replace(example, chosen=first, negatives=tuple(rest)))
            names.append([k for k, _ in lacking])
    if not wanted:
        return {}
    found: dict[bytes, Value] = {}
    scored = reference_pass(model, wanted, batch_size=len(wanted))
    for example, own in zip(scored, names, strict=True):
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


def _check_canaries(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    keys: Sequence[Sequence[bytes]],
    cache: ReferenceCache,
    *,
    rounded: bool,
) -> None:
    """Score a few examples again whose values are all stored, and compare.

    Raises:
        ReferenceCacheError: the reference model gives other values now.
    """
    stored = [i for i, own in enumerate(keys) if all(cache.get(key) is not None for key in own)]
    for i in stored[:: max(1, len(stored) // CANARIES)][:CANARIES]:
        now = _finite_values(reference_pass(model, [examples[i]])[0])
        old = [_known(cache, key) for key in keys[i]]
        wrong = differs(old, now, [len(c.ids) for c in examples[i].completions], rounded=rounded)
        if wrong is not None:
            raise ReferenceCacheError(
                f"{cache.folder}: stale: for example {examples[i].id}, response {wrong}, the stored log-likelihood is "
                f"{old[wrong][0]:.4f}, but the reference gives {now[wrong][0]:.4f} now (another machine or other "
                "kernels?); delete the folder, or name another one in train.reference_cache"
            )
