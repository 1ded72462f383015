"""Writes a sharded model as safetensors, tensor by tensor: no process holds more of it than its part and one tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cwdpo.models.sharding import whole

_LARGEST_FILE = "50GB"
"""As in transformers."""
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_LAYER = re.compile(r"(.*\.\d+)\.")


@torch.no_grad()
def write_adapter(model: Any, folder: Path | None) -> None:
    """``save_pretrained`` of an adapter without its base. All processes call this, one of them with a folder."""
    values = {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}
    if folder is not None:
        model.save_pretrained(folder, state_dict=values)


@torch.no_grad()
def write_full(model: Any, folder: Path | None) -> None:
    """``save_pretrained`` of a model without an adapter. All processes call this, one of them with a folder.

    The files have the same names, tensors and values as those of a model that is not sharded.

    Args:
        model: sharded, with the conversions that its file names need (:func:`cwdpo.models.write.use_hub_names`).
        folder: of the process that writes; ``None`` for the others.
    """
    tensors = _once(model)
    groups = _groups(model, tensors)
    with ExitStack() as opened:
        file = None
        if folder is not None:
            model.save_pretrained(
                folder, state_dict={}
            )  # the configuration, and the code that comes with the model
            file = _Files(folder, _on_disk(model, tensors), opened)
        for names in groups:
            values = {name: whole(tensors[name].detach()).cpu() for name in names}
            if file is not None:
                file.write(_converted(model, values))


def _once(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones, the first that the model does not tie on loading."""
    state = model.state_dict(keep_vars=True)
    tied = {*(getattr(model, "all_tied_weights_keys", None) or ())}
    ignored = {*(model._keys_to_ignore_on_save or ())}
    found: dict[int, str] = {}
    for name, tensor in state.items():
        if name not in ignored and (id(tensor) not in found or found[id(tensor)] in tied):
            found[id(tensor)] = name
    return {name: state[name] for name in found.values()}


def _converted(model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with their names, shapes and order of values in files."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, dict(values))
    return found


def _on_disk(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the files, on the meta device."""
    return _converted(model, {name: _shape(tensor) for name, tensor in tensors.items()})


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _groups(model: Any, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the tensors that must be converted together: most alone, some by layer, the rest all at once."""
    wanted = {name: tuple(t.shape) for name, t in _on_disk(model, tensors).items()}

    def enough(names: Sequence[str]) -> bool:
        try:
            made = _converted(model, {name: _shape(tensors[name]) for name in names})
        except Exception:  # operations raise many types of error for a part of what they need
            return False
        return bool(made) and all(wanted.get(name) == tuple(t.shape) for name, t in made.items())

    groups, left = [], dict[str, list[str]]()
    for name in tensors:
        if enough([name]):
            groups.append([name])
        else:
            layer = _LAYER.match(name)
            left.setdefault(layer[1] if layer else "", []).append(name)
    together = [names for names in left.values() if not enough(names)]
    groups += [names for names in left.values() if names not in together]
    return groups + ([[name for names in together for name in names]] if together else [])


class _Files:
    """The files of a model, each with its header; tensors are written to their places in any order.

    Args:
        folder: where they are written.
        tensors: all tensors, on the meta device.
        opened: closes them.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], opened: ExitStack) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda t: t.numel() * t.element_size(),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=_LARGEST_FILE,
        )
        self.places: dict[str, tuple[BinaryIO, int]] = {}
        for file, names in split.filename_to_tensors.items():
            stream = opened.enter_context((folder / file).open("wb"))
            for name, at in _header(stream, {name: tensors[name] for name in names}):
                self.places[name] = stream, at
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to their places."""
        for name, tensor in tensors.items():
            stream, at = self.places[name]
            stream.seek(at)
            stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _header(stream: BinaryIO, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Write the header of a safetensors file; gives the place of each tensor in the file, in bytes.

    Source: https://huggingface.co/docs/safetensors/index#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # As safetensors: by size of a number, then by name, so that every tensor begins at a multiple of it.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.truncate(8 + len(text) + end)
    for name in tensors:
        yield name, 8 + len(text) + header[name]["data_offsets"][0]
