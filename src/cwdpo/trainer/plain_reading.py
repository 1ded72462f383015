"""Reads checkpoints of ``torch.distributed.checkpoint`` and of DeepSpeed without running anything that they contain.

torch writes their table of contents, and values that are no tensors, as pickles, and reads them without limits
(2.13: ``FileSystemReader.read_metadata``, ``DefaultLoadPlanner.load_bytes``). So does DeepSpeed with all its files
(0.19: ``TorchCheckpointEngine.load``). A run folder may come from somebody else.
"""

from __future__ import annotations

import io
import pickle
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

_OF_TORCH = "torch.distributed.checkpoint."
_NAMES = {
    f"{_OF_TORCH}metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_OF_TORCH}filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""What the table of contents of torch's own writer names; dtypes come in addition."""


def _member(kind: Any, name: Any) -> Any:
    """In place of ``getattr``, which Python 3.11.0 to 3.11.3 write for the member of an enumeration.

    Raises:
        UnpicklingError: it is no member.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(
            "it calls getattr, which a checkpoint of torch does for a memory format only"
        )
    return kind[name]


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A name of :data:`_NAMES`, a dtype, or :func:`_member`.

        Raises:
            UnpicklingError: it is another one.
        """
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of torch does")
        return super().find_class(module, name)


class PlainReader(dcp.FileSystemReader):
    """Reads the table of contents with the names of :data:`_NAMES` only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents.

        Raises:
            UnpicklingError: it is none, or contains anything else.
        """
        found = _Table(io.BytesIO(Path(self._get_metadata_path(kwargs.get("rank"))).read_bytes())).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it is no table of contents, but {type(found).__name__}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class PlainPlanner(DefaultLoadPlanner):
    """Reads values that are no tensors as ``torch.load(weights_only=True)`` does."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value, check it, and let torch put it where it belongs.

        Raises:
            UnpicklingError: it holds more than tensors, numbers, texts and containers of them.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def load_parts(state: dict[str, Any], folder: Path, *, partial: bool = False) -> None:
    """``torch.distributed.checkpoint.load`` that runs nothing; all processes call it together, or one alone.

    Args:
        state: filled in place.
        folder: what ``torch.distributed.checkpoint.save`` wrote.
        partial: whether the checkpoint may lack some of the values.

    Raises:
        UnpicklingError: a process found something that cannot be read so; the message names its error.
    """
    planner = PlainPlanner(allow_partial_load=partial)
    try:
        with warnings.catch_warnings():
            # One process that puts the parts together is what is meant.
            warnings.filterwarnings(
                "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
            )
            dcp.load(state, storage_reader=PlainReader(folder), planner=planner)
    except CheckpointException as error:  # no Exception: it would pass every `except Exception`
        found = next(iter(error.failures.values()))[0]
        raise pickle.UnpicklingError(f"{type(found).__name__}: {found}") from None


def refuse_values(folder: Path) -> None:
    """Refuse a checkpoint that holds anything but tensors, before a library reads it without limits.

    Raises:
        UnpicklingError: it does, or its table of contents is none.
    """
    found = PlainReader(folder).read_metadata()
    others = [
        name for name, one in found.state_dict_metadata.items() if not isinstance(one, TensorStorageMetadata)
    ]
    if others:
        raise pickle.UnpicklingError(f"{folder}: {others[0]} is no tensor")


_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What DeepSpeed's files name besides tensors and plain containers."""


def deepspeed_parts(checkpoint: Path) -> list[str]:
    """Names of the folders in which DeepSpeed keeps a checkpoint; none if it did not write it."""
    return [path.name for path in checkpoint.glob("global_step*")]


def refuse_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files of DeepSpeed name anything that they do not need, before DeepSpeed reads them.

    Args:
        checkpoint: a folder ``checkpoint-N``; one without DeepSpeed's ``global_step*`` passes.

    Raises:
        UnpicklingError: it does, or what DeepSpeed would read is not in this folder.
    """
    steps = deepspeed_parts(checkpoint)
    if not steps:
        return
    latest = checkpoint / "latest"  # names the folder that DeepSpeed reads
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if named not in steps:
        raise pickle.UnpicklingError(f"{latest.name} names {named[:80]!r}, not one of its folders")
    for file in sorted((checkpoint / named).rglob("*.pt")):
        try:
            found = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _OF_DEEPSPEED
        # It is cut off, no zip, or another protocol of pickle: the parser has no errors of its own.
        except Exception as error:
            raise pickle.UnpicklingError(f"{file.name}: {type(error).__name__}: {error}") from None
        if found:
            raise pickle.UnpicklingError(
                f"{file.name} names {min(found)}, as no checkpoint of DeepSpeed does"
            )
