"""The reference's log-likelihoods on disk: one Arrow row per completion, found by everything that they depend on.

A folder holds one stream file per writer, so that runs share it without a lock. A file is a sequence of record
batches, each with a digest of its content: a kill leaves a cut last batch, which does not count; anything else that
cannot be read is damage, and refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from cwdpo.data.encode.encoder import EncodedCompletion, EncodedPrompt
from cwdpo.errors import ReferenceCacheError
from cwdpo.models.inputs import unwrapped
from cwdpo.models.shared_attention import shares_prefix

VERSION = 1
KEY_BYTES = 16
Value = tuple[float, float]
"""(sum_logp, span_sum_logp) in nats."""
SCHEMA = pa.schema(
    [("key", pa.binary(KEY_BYTES)), ("sum_logp", pa.float64()), ("span_sum_logp", pa.float64())],
    metadata={"cwdpo.reference_cache": str(VERSION)},
)


class ReferenceCache:
    """Values by key, read from every file of a folder, and one file of its own to append to.

    Args:
        folder: shared between runs; made when the first value is stored.
        read: whether what others stored is read now.

    Raises:
        ReferenceCacheError: a file of the folder is damaged or of another kind.
    """

    def __init__(self, folder: Path, *, read: bool = True) -> None:
        self.folder = folder
        self._values: dict[bytes, Value] = {}
        self._writer: Any = None
        self._file: Any = None
        for path in sorted(folder.glob("*.arrow")) if read else ():
            self._values |= read_file(path)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> Value | None:
        """The stored value, or ``None``."""
        return self._values.get(key)

    def add(self, values: Mapping[bytes, Value]) -> None:
        """Remember values of this process's own; nothing is written."""
        self._values |= values

    def append(self, values: Mapping[bytes, Value]) -> None:
        """Store values as one record batch; whole on disk, or not there, whenever the process is killed."""
        self._values |= values
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
        """Have everything on disk and let go of the file."""
        if self._writer is not None:
            self._writer.close()
            os.fsync(self._file.fileno())
            self._file.close()
            self._writer = None


def read_file(path: Path) -> dict[bytes, Value]:
    """The values of one file; a last record batch that was cut off by a kill is left out.

    Raises:
        ReferenceCacheError: it is not a reference cache, or some record batch is not what was written.
    """
    data = path.read_bytes()
    if HEADER.startswith(data):
        return {}
    if not data.startswith(HEADER):
        raise ReferenceCacheError(_damage(path, "it is not a reference cache of this version"))
    values: dict[bytes, Value] = {}
    source = pa.BufferReader(data)
    reader = pa.ipc.open_stream(source)
    while True:
        try:
            batch = reader.read_next_batch_with_custom_metadata()
            told, content = (batch.custom_metadata or {}).get("digest"), _content(batch.batch)
            columns = [column.to_pylist() for column in batch.batch.columns]
        except StopIteration:
            if source.tell() < len(data):
                raise ReferenceCacheError(_damage(path, "its end stands before its last byte")) from None
            return values
        except Exception as error:  # Arrow raises nearly anything on bytes that are not its own
            if not data.endswith(END):
                return values  # its writer was killed here
            raise ReferenceCacheError(_damage(path, str(error).partition("\n")[0])) from None
        if told != content:
            raise ReferenceCacheError(_damage(path, f"the rows behind the first {len(values)} were changed"))
        values |= {key: (total, span) for key, total, span in zip(*columns, strict=True)}


def _header() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA):
        pass
    whole: bytes = sink.getvalue().to_pybytes()
    return whole[: -len(END)]


END = b"\xff\xff\xff\xff\0\0\0\0"
"""How an Arrow stream ends that was closed."""
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


def row_keys(reference: str, prompt: EncodedPrompt, completions: Sequence[EncodedCompletion]) -> list[bytes]:
    """What each completion's value depends on, as digests of 16 bytes.

    Args:
        reference: of :func:`reference_digest`.
        prompt: its ids (after template and image expansion), and the digest of its picture as the processor made it:
            another pixel or another processor setting gives another one.
        completions: their ids and differing spans.
    """
    start = _digest(f"{VERSION} {reference} {prompt.image_digest}".encode(), _bytes(prompt.input_ids))
    return [_digest(start, _bytes(c.span), _bytes(c.ids)) for c in completions]


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _bytes(numbers: Sequence[int]) -> bytes:
    return array("q", numbers).tobytes()


@torch.no_grad()
def reference_digest(model: nn.Module, *, bf16: bool = False) -> str:
    """A digest of what scores: all weights, their dtype, the attention, the layout of rows, transformers' version.

    A fresh adapter changes nothing of what the model says and does not count, so that runs of other seeds find the
    values of the same base.

    Args:
        model: the reference, bare or wrapped.
        bf16: whether it is run under bfloat16 autocast.
    """
    config = unwrapped(model).config
    attention = [getattr(config, "_attn_implementation", None), config.get_text_config()._attn_implementation]
    facts = [VERSION, attention, shares_prefix(model), bf16, metadata.version("transformers")]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    named = list(model.named_parameters())
    if not any(bool(p.any()) for name, p in named if ".lora_B." in name):
        named = [(name, p) for name, p in named if ".lora_" not in name]
    with ThreadPoolExecutor() as pool:
        for (name, parameter), own in zip(
            named, pool.map(_weight_digest, (p for _, p in named)), strict=True
        ):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {own}\n".encode())
    return digest.hexdigest()


def _weight_digest(parameter: Tensor) -> str:
    data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(memoryview(data.numpy()), digest_size=16).hexdigest()


def differs(
    stored: Sequence[Value], now: Sequence[Value], tokens: Sequence[int], *, rounded: bool
) -> int | None:
    """Index of the first value that is not what the reference says now; ``None`` where all agree.

    Values depend a little on the company of a row: nats per token may differ by 1e-3 in fp32, by 0.1 in bfloat16.
    """
    limit = 0.1 if rounded else 1e-3
    for index, (old, new, n) in enumerate(zip(stored, now, tokens, strict=True)):
        if abs(old[0] - new[0]) > limit * n or abs(old[1] - new[1]) > limit * n:
            return index
    return None
