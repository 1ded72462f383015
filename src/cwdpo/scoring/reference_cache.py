"""The reference model's log-likelihoods on disk: one Arrow row per completion.

The key of a row is a digest of everything that its value depends on. Each process writes to a stream file of its own,
so runs share a folder without a lock. A file is a sequence of record batches, each with a digest of its content. If
the writer was killed, the last batch is incomplete and is ignored. Anything else that cannot be read is damage and
raises an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import ReferenceCacheError
from cwdpo.models.inputs import unwrapped
from cwdpo.models.quantization import state_of_layers
from cwdpo.models.sharding import anything, is_sharded, whole
from cwdpo.models.shared_attention import shares_prefix

VERSION = 1
KEY_BYTES = 16
_KEY = f"S{KEY_BYTES}"
"""Numpy's type of a key: zeros at the end do not count, which does no harm, as all have the same length."""
Value = tuple[float, float]
"""(sum_logp, span_sum_logp) in nats."""
SCHEMA = pa.schema(
    [("key", pa.binary(KEY_BYTES)), ("sum_logp", pa.float64()), ("span_sum_logp", pa.float64())],
    metadata={"cwdpo.reference_cache": str(VERSION)},
)


class ReferenceValues:
    """The values of some completions, in arrays: about 40 bytes for each.

    Completions with the same key share a value.

    Args:
        keys: the keys of all completions, one after the other, :data:`KEY_BYTES` each.

    Attributes:
        slots: [C] where each completion's value is.
    """

    def __init__(self, keys: bytes | bytearray) -> None:
        self._keys, self.slots = np.unique(np.frombuffer(keys, dtype=_KEY), return_inverse=True)
        self._values: Any = np.full((len(self._keys), 2), np.nan)
        self._known: Any = np.zeros(len(self._keys), dtype=bool)

    def fill(self, folder: Path) -> None:
        """Take over the values that the files of a folder have.

        Raises:
            ReferenceCacheError: a file of the folder is damaged or is not a reference cache.
        """
        for path in sorted(folder.glob("*.arrow")):
            for keys, values in read_file(path):
                self._take(np.frombuffer(b"".join(keys), dtype=_KEY), np.asarray(values).reshape(-1, 2))

    def _take(self, keys: Any, values: Any) -> None:
        if not len(self._keys):
            return
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        wanted = self._keys[places] == keys
        self._values[places[wanted]], self._known[places[wanted]] = values[wanted], True

    def known(self, slots: Any) -> Any:
        """For each slot, whether it has a value."""
        return self._known[slots]

    def values(self, slots: Any) -> Any:
        """[..., 2] the values; not a number where there is none."""
        return self._values[slots]

    def put(self, values: Mapping[int, Value]) -> None:
        """Keep values by slot; nothing is written."""
        if values:
            slots = list(values)
            self._values[slots], self._known[slots] = list(values.values()), True

    def by_key(self, values: Mapping[int, Value]) -> dict[bytes, Value]:
        """Values by slot, as values by key."""
        raw = self._keys.view(np.uint8).reshape(
            -1, KEY_BYTES
        )  # numpy cuts zeros from the end of a single key
        return {raw[slot].tobytes(): value for slot, value in values.items()}

    @property
    def state(self) -> tuple[Any, Any]:
        """All values and which are known; another process with the same completions can take them over."""
        return self._values, self._known

    @state.setter
    def state(self, state: tuple[Any, Any]) -> None:
        self._values, self._known = state


class CacheWriter:
    """Appends values to a file of this process's own, in a folder that runs share.

    Args:
        folder: created, like the file, when the first value is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._file: Any = None

    def append(self, values: Mapping[bytes, Value]) -> None:
        """Write values as one record batch. If the process is killed, the batch is on disk completely or is ignored."""
        if not values:
            return
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{uuid.uuid4().hex}.arrow"
            self._file = path.open("xb", buffering=0)
            self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        batch = pa.record_batch(
            [list(values), [v[0] for v in values.values()], [v[1] for v in values.values()]], schema=SCHEMA
        )
        self._writer.write_batch(batch, custom_metadata={"digest": _content(batch)})

    def close(self) -> None:
        """Flush everything to disk and close the file."""
        if self._writer is not None:
            self._writer.close()
            os.fsync(self._file.fileno())
            self._file.close()
            self._writer = None


def read_file(path: Path) -> Iterator[tuple[list[bytes], list[Value]]]:
    """The keys and values of one file by record batch; an incomplete last one (its writer was killed) is left out.

    Raises:
        ReferenceCacheError: the file is not a reference cache, or a record batch was changed after it was written.
    """
    data = path.read_bytes()
    if HEADER.startswith(data):
        return
    if not data.startswith(HEADER):
        raise ReferenceCacheError(_damage(path, "it is not a reference cache of this version"))
    read = 0
    source = pa.BufferReader(data)
    reader = pa.ipc.open_stream(source)
    while True:
        try:
            batch = reader.read_next_batch_with_custom_metadata()
            told, content = (batch.custom_metadata or {}).get("digest"), _content(batch.batch)
            columns = [column.to_pylist() for column in batch.batch.columns]
        except StopIteration:
            if source.tell() < len(data):
                raise ReferenceCacheError(_damage(path, "data follow its end mark")) from None
            return
        except Exception as error:  # on damaged bytes Arrow raises many types of error
            if not data.endswith(END):
                return  # no end mark: the writer was killed while it wrote this batch
            raise ReferenceCacheError(_damage(path, str(error).partition("\n")[0])) from None
        if told != content:
            raise ReferenceCacheError(_damage(path, f"the rows after the first {read} were changed"))
        keys, sums, spans = columns
        read += len(keys)
        yield keys, list(zip(sums, spans, strict=True))


def _header() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA):
        pass
    whole: bytes = sink.getvalue().to_pybytes()
    return whole[: -len(END)]


END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow stream that was closed properly."""
HEADER = _header()


def _damage(path: Path, what: str) -> str:
    return f"{path}: damaged ({what}); delete the file: its values will be computed again"


def _content(batch: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for column in batch.columns:
        values = column.to_pylist()
        digest.update(
            b"".join(values) if column.type == SCHEMA.field("key").type else array("d", values).tobytes()
        )
    return digest.hexdigest().encode()


def row_keys(reference: str, example: EncodedExample) -> list[bytes]:
    """The cache keys of an example's completions: 16-byte digests of everything that their values depend on.

    These are the reference model, the token ids of the completion's prompt (after chat template and image expansion),
    the digest of its processed images (it changes with every pixel and every processor setting), and the completion's
    token ids and differing span.

    Args:
        reference: the result of :func:`reference_digest`.
        example: chosen and negatives.
    """
    starts = {
        id(prompt): _digest(f"{VERSION} {reference} {prompt.image_digest}".encode(), _bytes(prompt.input_ids))
        for prompt in example.prompts
    }
    return [
        _digest(starts[id(example.prompt_of(c))], _bytes(c.span), _bytes(c.ids)) for c in example.completions
    ]


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _bytes(numbers: Sequence[int]) -> bytes:
    return array("q", numbers).tobytes()


@torch.no_grad()
def reference_digest(model: nn.Module, *, bf16: bool = False) -> str:
    """A digest of the reference model: weights and their dtypes, attention kernel, row layout, transformers version.

    Of a quantized model, the scales of its weights and the dtype that it computes in are part of it.

    An untrained LoRA adapter (all ``lora_B`` are zero) does not change the model's output. It is left out of the
    digest, so that runs with other seeds find the values of the same base model.

    Args:
        model: the reference model, bare or wrapped.
        bf16: whether it runs under bfloat16 autocast.
    """
    config = unwrapped(model).config
    attention = [getattr(config, "_attn_implementation", None), config.get_text_config()._attn_implementation]
    facts = [VERSION, attention, shares_prefix(model), bf16, metadata.version("transformers")]
    return _of_weights(model, hashlib.blake2b(json.dumps(facts).encode(), digest_size=16))


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """A digest of all weights with their names, shapes and dtypes; a fresh adapter does not count.

    Of a sharded model, all processes call this together.
    """
    return _of_weights(model, hashlib.blake2b(digest_size=16))


def _of_weights(model: nn.Module, digest: Any) -> str:
    named = list(model.named_parameters())
    if not anything(p for name, p in named if ".lora_B." in name):
        named = [(name, p) for name, p in named if ".lora_" not in name]
    parameters = (p for _, p in named)
    with ThreadPoolExecutor() as pool:
        # The tensors of a sharded model are gathered one by one.
        found = (
            map(_weight_digest, map(whole, parameters))
            if is_sharded(model)
            else pool.map(_weight_digest, parameters)
        )
        for (name, parameter), own in zip(named, found, strict=True):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {own}\n".encode())
    for name, value in state_of_layers(unwrapped(model)):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {_weight_digest(value)}\n".encode())
    return str(digest.hexdigest())


def _weight_digest(parameter: Tensor) -> str:
    data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(memoryview(data.numpy()), digest_size=16).hexdigest()


def differs(
    stored: Sequence[Value], now: Sequence[Value], tokens: Sequence[int], *, rounded: bool
) -> int | None:
    """Index of the first stored value that differs from the one computed now; ``None`` if all agree.

    A value depends slightly on the other rows of its batch. The tolerance in nats per token is 1e-3, or 0.1 if
    ``rounded`` (bfloat16).

    Args:
        stored, now: values of the same completions, from the cache and computed now.
        tokens: number of tokens of each completion.
        rounded: whether the reference model ran in bfloat16.
    """
    limit = 0.1 if rounded else 1e-3
    for index, (old, new, n) in enumerate(zip(stored, now, tokens, strict=True)):
        if abs(old[0] - new[0]) > limit * n or abs(old[1] - new[1]) > limit * n:
            return index
    return None
