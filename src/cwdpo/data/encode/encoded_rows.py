"""Encoded examples in an Arrow file that is mapped into memory: token ids, spans, and where their images are.

An example is made of its row when it is used. What changes after it is written, the reference values and which
negatives are kept, is in arrays with an entry for each completion.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cwdpo.data.encode.encoded_prompt import EncodedPrompt
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, Encoder, NegativeSet, offered
from cwdpo.data.encode.prompts import ImageSource
from cwdpo.errors import DataError
from cwdpo.records import Example

_BATCH = 1024
"""Rows of a record batch."""
_KEPT = 32 * _BATCH
"""Rows after which a pass over the file lets go of its pages, which would else count as memory of this process."""
_SINGLY = 1024
"""The same for rows that are read one by one, each from pages of its own."""
_PROMPT = pa.struct(
    [
        ("ids", pa.binary()), ("names", pa.list_(pa.string())), ("values", pa.list_(pa.binary())),
        ("image_digest", pa.string()), ("n_videos", pa.int32()), ("images_of", pa.int32()),
    ]
)  # fmt: skip
"""Ids and per-token outputs are 32-bit integers. ``images_of``: the negative whose images it has; -1: the example's."""
_COMPLETION = pa.struct(
    [
        ("ids", pa.binary()), ("origin", pa.string()), ("kind", pa.string()), ("first", pa.int32()),
        ("last", pa.int32()), ("reward_margin", pa.float64()), ("prompt", pa.int32()),
    ]
)  # fmt: skip
"""``first`` and ``last`` are its span, ``prompt`` the index of its prompt."""
SCHEMA = pa.schema(
    [
        ("number", pa.int64()), ("id", pa.string()), ("source", pa.string()),
        ("prompts", pa.list_(_PROMPT)), ("completions", pa.list_(_COMPLETION)),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class _Images:
    """Loads the images of a stored prompt: its example is read when they are needed."""

    rows: EncodedRows
    number: int
    prompt: Mapping[str, Any]

    def _source(self) -> ImageSource:
        example, of = self.rows.examples[self.number], self.prompt["images_of"]
        if of >= 0:
            images = offered(example, self.rows.negatives)[of].images
            assert images is not None
            example = replace(example, images=images)
        ids, per_token = _tokens(self.prompt)
        return ImageSource(self.rows.encoder.prompt, example, ids, per_token, self.prompt["image_digest"])

    def __call__(self) -> Any:
        return self._source()()

    def begin(self) -> Any:
        return self._source().begin()


class EncodedRows(Sequence[EncodedExample]):
    """The encoded examples of a file, in place of a list.

    Args:
        path: an Arrow file that :func:`write_rows` wrote.
        examples: what they were encoded from; read for their images.
        negatives: which negatives were encoded.
        encoder: reads the images.
    """

    def __init__(
        self, path: Path, examples: Sequence[Example], negatives: NegativeSet, encoder: Encoder
    ) -> None:
        self.examples, self.negatives, self.encoder = examples, negatives, encoder
        self._map = _mapped(path)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        column = pa.chunked_array([b.column("completions") for b in self._batches], SCHEMA.field(4).type)
        counts = np.asarray(pc.list_value_length(column), dtype=np.int64)
        self.first: Any = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        """[R + 1] for each row of the file, the number of its first completion among all."""
        self.lengths: Any = _sizes(pc.list_flatten(column))
        """[C] tokens of each completion."""
        prompts = pa.chunked_array([b.column("prompts") for b in self._batches], SCHEMA.field(3).type)
        self._n_prompts: Any = np.asarray(pc.list_value_length(prompts), dtype=np.int64)
        first_prompts = np.cumsum(self._n_prompts) - self._n_prompts
        self._own: Any = _sizes(pc.list_flatten(prompts))[first_prompts]
        self.index: Any = np.arange(len(counts))
        self._release()
        self._read_singly = 0
        self._reference: Any = None
        self._kept: Any = None

    def _view(self, **changes: Any) -> EncodedRows:
        view = object.__new__(EncodedRows)
        vars(view).update({**vars(self), **changes})
        return view

    def select(self, index: Any) -> EncodedRows:
        """The rows at these places, as a view."""
        return self._view(index=self.index[index])

    def with_reference(self, values: Any) -> EncodedRows:
        """The rows with reference values: ``(sum_logp, span_sum_logp)`` [C, 2] of all completions of the file."""
        return self._view(_reference=values)

    def of_all_completions(self, values: Any) -> Any:
        """Values of the rows' completions [., 2], one after the other, at the places that they have in the file [C, 2].

        Those of rows that are not selected are not a number.
        """
        found = np.full((len(self.lengths), 2), np.nan)
        found[self._completions()[0]] = values
        return found

    def reference_means(self) -> tuple[Any, Any]:
        """See :func:`reference_means`."""
        if self._reference is None:
            return np.zeros(0), np.zeros(0)
        means = self._reference[:, 0] / self.lengths
        places, chosen = self._completions()
        kept = np.ones(len(places), dtype=bool) if self._kept is None else self._kept[places]
        return means[places[chosen]], means[places[kept & ~chosen]]

    def _completions(self) -> tuple[Any, Any]:
        """Of the completions of the rows, one after the other: their places in the file, and which are chosen."""
        counts = np.diff(self.first)[self.index]
        begins = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(self.first[self.index] - begins, counts)
        chosen = np.zeros(len(places), dtype=bool)
        chosen[begins] = True
        return places, chosen

    def filtered(self, keeps: Callable[[float], bool], *, need: bool) -> EncodedRows:
        """The rows without the negatives whose reference mean_logp ``keeps`` refuses.

        Args:
            keeps: of a mean_logp, in nats per token.
            need: leave out rows without a negative.
        """
        kept = np.ones(len(self.lengths), dtype=bool)
        if self._reference is not None:
            means = self._reference[:, 0] / self.lengths
            kept = np.fromiter(map(keeps, means.tolist()), dtype=bool, count=len(means))
        kept[self.first[:-1]] = True  # chosen
        if not need:
            return self._view(_kept=kept)
        negatives = np.add.reduceat(kept, self.first[:-1]) - 1 if len(kept) else kept
        return self._view(_kept=kept, index=self.index[negatives[self.index] > 0])

    @property
    def numbers(self) -> Any:
        """[B] the places of the rows' examples in :attr:`examples`."""
        return np.concatenate([np.asarray(b.column("number")) for b in self._batches])[self.index]

    def row_sizes(self, *, shared: bool, negatives: bool = True) -> tuple[Any, Any, Any]:
        """For each row (number of rows in scoring, tokens of the longest one, of all), see ``row_tokens``.

        Args:
            shared: shared-prefix rows.
            negatives: with the negatives.
        """
        if (self._n_prompts > 1).any():
            plain = self if negatives else (replace(e, negatives=()) for e in self)
            sizes = np.empty((3, len(self)), dtype=np.int64)
            for i, example in enumerate(plain):
                tokens = example.row_tokens(shared=shared)
                sizes[:, i] = len(tokens), max(tokens), sum(tokens)
            return tuple(sizes)  # type: ignore[return-value]
        lengths = self.lengths * (1 if self._kept is None else self._kept)
        counts = (
            np.diff(self.first)
            if self._kept is None
            else np.add.reduceat(self._kept.astype(np.int64), self.first[:-1])
        )
        starts = self.first[:-1]
        total, longest = np.add.reduceat(lengths, starts), np.maximum.reduceat(lengths, starts)
        if not negatives:
            total = longest = lengths[starts]
            counts = np.ones_like(counts)
        if shared:
            found = np.ones_like(total), self._own + total, self._own + total
        else:
            found = counts, self._own + longest, self._own * counts + total
        return tuple(values[self.index] for values in found)  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedRows: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | EncodedRows:
        if isinstance(index, slice):
            return self.select(index)
        self._read_singly += 1
        if self._read_singly % _SINGLY == 0:
            self._release()
        row = int(self.index[index])
        (found,) = self._batches[row // _BATCH].slice(row % _BATCH, 1).to_pylist()
        return self._example(row, found)

    def _release(self) -> None:
        """Count the pages that were read as free again; whoever needs one gets it from the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __iter__(self) -> Iterator[EncodedExample]:
        start, order, passed = 0, self.index, 0
        while start < len(order):
            if start - passed >= _KEPT:
                self._release()
                passed = start
            batch = order[start] // _BATCH
            inside = np.flatnonzero(order[start : start + _BATCH] // _BATCH != batch)
            end = start + (int(inside[0]) if len(inside) else min(_BATCH, len(order) - start))
            rows = order[start:end]
            for row, found in zip(
                rows.tolist(), self._batches[batch].take(pa.array(rows % _BATCH)).to_pylist(), strict=True
            ):
                yield self._example(row, found)
            start = end
        self._release()

    def _example(self, row: int, found: Mapping[str, Any]) -> EncodedExample:
        prompts = [self._prompt(found["number"], p) for p in found["prompts"]]
        completions = []
        for place, c in enumerate(found["completions"], int(self.first[row])):
            if self._kept is not None and not self._kept[place]:
                continue
            total, span = (None, None) if self._reference is None else self._reference[place].tolist()
            completions.append(
                EncodedCompletion(
                    _integers(c["ids"]), c["origin"], c["kind"], (c["first"], c["last"]), total, span,
                    c["reward_margin"], prompts[c["prompt"]] if c["prompt"] else None,
                )
            )  # fmt: skip
        return EncodedExample(
            found["id"], prompts[0], completions[0], tuple(completions[1:]), found["source"]
        )

    def _prompt(self, number: int, prompt: Mapping[str, Any]) -> EncodedPrompt:
        ids, per_token = _tokens(prompt)
        if not prompt["image_digest"]:
            return EncodedPrompt(ids, per_token)
        images = _Images(self, number, prompt)
        return EncodedPrompt(ids, per_token, images, prompt["image_digest"], prompt["n_videos"])


def reference_means(rows: Sequence[EncodedExample]) -> tuple[Any, Any]:
    """Reference mean_logps (nats per token) of the chosen responses, and of the negatives, in the order of the rows.

    Responses without a reference value are left out.
    """
    if isinstance(rows, EncodedRows):
        return rows.reference_means()
    chosen = [m for e in rows if (m := e.chosen.reference_mean_logp) is not None]
    negatives = [m for e in rows for c in e.negatives if (m := c.reference_mean_logp) is not None]
    return np.array(chosen), np.array(negatives)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tokens(prompt: Mapping[str, Any]) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    values = map(_integers, prompt["values"])
    return _integers(prompt["ids"]), dict(zip(prompt["names"], values, strict=True))


def _integers(data: bytes) -> tuple[int, ...]:
    values = array("i")
    values.frombytes(data)
    return tuple(values)


def _bytes(values: Sequence[int]) -> bytes:
    return array("i", values).tobytes()


def _sizes(column: Any) -> Any:
    """Tokens of the ids of prompts or completions."""
    if not len(column):
        return np.zeros(0, dtype=np.int64)
    sizes = [pc.binary_length(chunk.field("ids")) for chunk in column.chunks]
    return np.concatenate([np.asarray(size, dtype=np.int64) for size in sizes]) // 4


def write_rows(path: Path, batches: Iterable[Any]) -> None:
    """Write record batches (:func:`batch_of`) of any sizes, one after the other.

    Raises:
        DataError: the file cannot be written.
    """
    rest = SCHEMA.empty_table()
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in batches:
                rest = pa.concat_tables([rest, pa.Table.from_batches([batch], SCHEMA)])
                while len(rest) >= _BATCH:
                    _write(writer, rest[:_BATCH])
                    rest = rest[_BATCH:]
            if len(rest):
                _write(writer, rest)
    except OSError as error:
        raise DataError(f"{path}: the encoded rows cannot be written ({error})") from None


def _write(writer: Any, rows: Any) -> None:
    """Write rows as one record batch."""
    (batch,) = rows.combine_chunks().to_batches()
    writer.write_batch(batch)


def batch_of(encoded: Iterable[tuple[int, Example, EncodedExample]], negatives: NegativeSet) -> Any:
    """A record batch of encoded examples with the places of their examples."""
    return pa.RecordBatch.from_pylist([_row(*one, negatives) for one in encoded], SCHEMA)


def _row(number: int, example: Example, row: EncodedExample, negatives: NegativeSet) -> dict[str, Any]:
    prompts = row.prompts
    places = {id(prompt): i for i, prompt in enumerate(prompts)}
    images = [c.images for c in offered(example, negatives)]
    return {
        "number": number,
        "id": row.id,
        "source": row.source,
        "prompts": [
            {
                "ids": _bytes(p.input_ids),
                "names": list(p.per_token),
                "values": [_bytes(v) for v in p.per_token.values()],
                "image_digest": p.image_digest,
                "n_videos": p.n_videos,
                "images_of": images.index(getattr(p.load_images, "example", example).images) if i else -1,
            }
            for i, p in enumerate(prompts)
        ],
        "completions": [
            {
                "ids": _bytes(c.ids),
                "origin": c.origin,
                "kind": c.kind,
                "first": c.span[0],
                "last": c.span[1],
                "reward_margin": c.reward_margin,
                "prompt": 0 if c.prompt is None else places[id(c.prompt)],
            }
            for c in row.completions
        ],
    }
