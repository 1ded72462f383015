"""The reference pass of a run: values are read from the cache, and what is missing is scored and stored as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from cwdpo.data.encode.encoder import EncodedExample, with_reference
from cwdpo.errors import NonFiniteError, ReferenceCacheError
from cwdpo.rundir import RunDir
from cwdpo.scoring.pairs import reference_pass
from cwdpo.scoring.reference_cache import ReferenceCache, Value, differs, reference_digest, row_keys

FOLDER = "reference"
CANARIES = 4
"""Examples whose stored values are compared with what the reference says now, before any is used."""


def stored_reference_pass(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    run: RunDir,
    *,
    batch_size: int,
    bf16: bool = False,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[EncodedExample]:
    """As :func:`cwdpo.scoring.pairs.reference_pass`, but only for completions that the cache lacks.

    Several processes share the work; the main one reads and writes. Batches are the same whatever is stored, and each
    is stored as a whole: a resumed run ends with the same values to the last bit.

    Args:
        model: the reference.
        examples: P prompts with their completions.
        run: the run; its process with ``run.writes`` stores.
        batch_size: prompts per forward.
        bf16: whether the caller scores under bfloat16.
        folder: where values are kept, shared between runs; default ``reference/`` in the run folder.
        progress: called with the number of finished prompts.

    Returns:
        The examples with reference sums (nats), in their order.

    Raises:
        NonFiniteError, ReferenceCacheError: an example's value is not finite; a stored one is damaged or stale.
    """
    state = PartialState()
    digest = reference_digest(model, bf16=bf16)
    keys = [row_keys(digest, e.prompt, e.completions) for e in examples]
    rounded = bf16 or next(model.parameters()).dtype != torch.float32
    cache = _opened(folder or run.path / FOLDER, model, examples, keys, rounded=rounded)
    order = sorted(range(len(examples)), key=lambda i: (examples[i].n_tokens, i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for first in range(0, len(batches), state.num_processes):
        group = batches[first : first + state.num_processes]
        own = group[state.process_index] if state.process_index < len(group) else []
        scored, problem = {}, ""
        try:
            scored = _missing(model, [examples[i] for i in own], [keys[i] for i in own], cache)
        except NonFiniteError as error:
            problem = str(error)
        parts = gather_object([(scored, problem)]) if state.num_processes > 1 else [(scored, problem)]
        problems = [text for _, text in parts if text]
        if problems:  # on every process: the others would wait for ever
            raise NonFiniteError(problems[0])
        scored = {key: value for part, _ in parts for key, value in part.items()}
        if run.writes:
            cache.append(scored)
        cache.add(scored)
        for batch in group:
            progress(len(batch))
    cache.close()
    return [
        with_reference(example, [_known(cache, key) for key in own])
        for example, own in zip(examples, keys, strict=True)
    ]


def _opened(
    folder: Path,
    model: nn.Module,
    examples: Sequence[EncodedExample],
    keys: Sequence[Sequence[bytes]],
    *,
    rounded: bool,
) -> ReferenceCache:
    """The cache as the main process reads it, with what it holds of ``keys``; an error there is everyone's error."""
    state = PartialState()
    cache = ReferenceCache(folder, read=False)
    found: dict[bytes, Value] = {}
    error = ""
    if state.is_main_process:
        try:
            cache = ReferenceCache(folder)
            found = {key: value for own in keys for key in own if (value := cache.get(key)) is not None}
            _check_canaries(model, examples, keys, cache, rounded=rounded)
        except (ReferenceCacheError, NonFiniteError) as problem:
            error = str(problem)
    if state.num_processes > 1:
        found, error = broadcast_object_list([found, error])
    if error:
        raise ReferenceCacheError(error)
    cache.add(found)
    return cache


def _known(cache: ReferenceCache, key: bytes) -> Value:
    value = cache.get(key)
    assert value is not None
    return value


def _missing(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    keys: Sequence[Sequence[bytes]],
    cache: ReferenceCache,
) -> dict[bytes, Value]:
    """Values of the completions of one batch that the cache lacks."""
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
                f"example {example.id}: the reference gives one of its responses the log-likelihood {total}; nothing "
                "was trained. Look at its picture and texts with `cwdpo validate`, or at the model's weights"
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
    """Score a few examples again whose values are all stored.

    Raises:
        ReferenceCacheError: the reference says something else now.
    """
    stored = [i for i, own in enumerate(keys) if all(cache.get(key) is not None for key in own)]
    for i in stored[:: max(1, len(stored) // CANARIES)][:CANARIES]:
        now = _finite_values(reference_pass(model, [examples[i]])[0])
        old = [_known(cache, key) for key in keys[i]]
        wrong = differs(old, now, [len(c.ids) for c in examples[i].completions], rounded=rounded)
        if wrong is not None:
            raise ReferenceCacheError(
                f"{cache.folder}: stale: of example {examples[i].id}, response {wrong}, it holds the log-likelihood "
                f"{old[wrong][0]:.4f}, and the reference says {now[wrong][0]:.4f} now, on another machine perhaps or "
                "with other kernels; delete the folder, or name another in train.reference_cache"
            )
