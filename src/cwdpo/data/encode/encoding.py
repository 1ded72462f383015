"""Encodes all examples of a stage: in this process, or in the encoder's workers, with equal results in equal order.

A worker gets some examples with what this process has learnt about the processor so far (see
:mod:`cwdpo.data.encode.expand`). Where it would have to learn more, or meets an error that is not a row's own, it gives
the examples back, and they are encoded here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cwdpo.data.contents import known_contents, remember_contents
from cwdpo.data.encode.encoded_rows import EncodedRows, batch_of, write_rows
from cwdpo.data.encode.encoder import TOGETHER, Encoder, NegativeSet
from cwdpo.data.encode.reading import HERE, dead_worker
from cwdpo.records import Example

PART = 4 * TOGETHER
"""Examples that are encoded at one place."""
FEWEST = 4096
"""Examples from which on workers encode them; fewer are ready before a worker has started."""
_AHEAD = 2
"""Parts that wait for each worker."""


@dataclass(frozen=True)
class _How:
    negatives: NegativeSet
    require_negative: bool
    max_length: int | None


_Encoded = tuple[bytes, list[str]]
"""A record batch as an Arrow stream, and the problems of the rows that are left out."""


def encode_rows(
    encoder: Encoder, examples: Sequence[Example], negatives: NegativeSet, *, require_negative: bool
) -> tuple[EncodedRows, list[str]]:
    """Like :meth:`Encoder.encode_all`, with the encoded examples in a temporary file.

    Raises:
        DataError: the file cannot be written.
        WorkerError: a worker died.
    """
    problems: list[str] = []
    handle, name = tempfile.mkstemp(suffix=".arrow")
    os.close(handle)
    path = Path(name)
    try:
        batches = encoded_batches(encoder, examples, negatives, problems, require_negative=require_negative)
        write_rows(path, batches)
        return EncodedRows(path, examples, negatives, encoder), problems
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
            path.unlink()


def encoded_batches(
    encoder: Encoder,
    examples: Sequence[Example],
    negatives: NegativeSet,
    problems: list[str],
    *,
    require_negative: bool,
) -> Iterator[Any]:
    """Record batches of all examples that can be encoded, in their order; the others add to ``problems``.

    Raises:
        WorkerError: a worker died.
    """
    how = _How(negatives, require_negative, encoder.max_length)
    parts = _Parts(encoder, examples, how, problems)
    workers = encoder.prompt.workers if len(examples) >= FEWEST else None
    waiting: deque[tuple[int, Future[_Encoded | None] | None]] = deque()
    for first in range(0, len(examples), PART):
        sent = workers.call(_encode, parts.order(first)) if workers and parts.settled else None
        waiting.append((first, sent))
        while len(waiting) > (_AHEAD * workers.n if workers and sent else 0):
            yield parts.finished(*waiting.popleft())
    while waiting:
        yield parts.finished(*waiting.popleft())


@dataclass
class _Parts:
    """The examples in parts of :data:`PART`, each named by the place of its first example.

    Attributes:
        settled: whether the last part that was encoded here taught nothing new; then workers may encode.
    """

    encoder: Encoder
    examples: Sequence[Example]
    how: _How
    problems: list[str]
    settled: bool = False

    def __getitem__(self, first: int) -> Sequence[Example]:
        return self.examples[first : first + PART]

    def order(self, first: int) -> bytes:
        """What a worker gets, as bytes: tensors in it would else go through shared memory."""
        part = list(self[first])
        known = known_contents(image for example in part for image in example.all_images)
        return pickle.dumps(
            (part, first, self.how, self.encoder.prompt.learnt, known), pickle.HIGHEST_PROTOCOL
        )

    def finished(self, first: int, sent: Future[_Encoded | None] | None) -> Any:
        """The record batch of a part: that of a worker, or made here."""
        try:
            found = None if sent is None else sent.result()
        except BrokenProcessPool:
            raise dead_worker("rows were encoded") from None
        if found is None:
            before = pickle.dumps(self.encoder.prompt.learnt)
            batch = _batch(self.encoder, self[first], first, self.how, self.problems)
            self.settled = pickle.dumps(self.encoder.prompt.learnt) == before
            return batch
        data, problems = found
        self.problems += problems
        return pa.ipc.open_stream(data).read_next_batch()


def _batch(encoder: Encoder, part: Sequence[Example], first: int, how: _How, problems: list[str]) -> Any:
    found = encoder.encodings(part, how.negatives, problems, require_negative=how.require_negative)
    return batch_of(((first + place, example, row) for place, example, row in found), how.negatives)


# --- in a worker ---------------------------------------------------------------------------------------


def _encode(order: bytes) -> _Encoded | None:
    """The rows of some examples; ``None`` if they must be encoded by the main process."""
    if "encoder" not in HERE:
        return None
    examples, first, how, learnt, contents = pickle.loads(order)
    encoder = Encoder.around(HERE["encoder"], how.max_length)
    encoder.prompt.take_over(learnt)
    remember_contents(contents)
    problems: list[str] = []
    try:
        batch = _batch(encoder, examples, first, how, problems)
    except (
        Exception
    ):  # something is to learn, or it is an error of the whole run: the main process meets it, too
        return None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes(), problems
