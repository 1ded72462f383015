"""A copy of the trained weights in host memory, to restore them or to use them for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cwdpo.errors import ModelError
from cwdpo.models.sharding import local_part


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: local_part(p.detach()) for n, p in model.named_parameters() if p.requires_grad}


class Weights:
    """A copy of the trained weights; for a sharded model, of this process's part.

    It takes the size of the trained parameters in host memory: with LoRA the adapters, else the whole model.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """A copy of a model's trained weights."""
        return cls({n: p.to("cpu", copy=True) for n, p in _trained(model).items()})

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Write the copy back, in place."""
        for name, parameter in _trained(model).items():
            parameter.copy_(self.values[name])

    @contextmanager
    def in_force(self, model: nn.Module) -> Iterator[None]:
        """While active, the model has these weights; afterwards it has its own again, bit for bit.

        The weights are exchanged one parameter at a time, so no second copy is needed.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in _trained(model).items():
            now = parameter.to("cpu", copy=True)
            parameter.copy_(self.values[name])
            self.values[name] = now

    def save(self, path: Path) -> None:
        """Write the copy as safetensors."""
        save_file({n: v.contiguous() for n, v in self.values.items()}, path)

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> Weights:
        """Read a copy of this model's weights.

        Raises:
            ModelError: the file cannot be read, or contains other parameters.
        """
        try:
            values = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: cannot be read ({error}); delete the checkpoint that contains it"
            ) from None
        trained = _trained(model)
        if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in trained.items()}:
            raise ModelError(
                f"{path}: contains other parameters than those trained; delete the checkpoint that contains it"
            )
        return cls(values)
