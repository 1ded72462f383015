"""A copy of the trained weights in host memory: to go back to, or to look through for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cwdpo.errors import ModelError
from cwdpo.trainer.guard import local_part


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: local_part(p.detach()) for n, p in model.named_parameters() if p.requires_grad}


class Weights:
    """The trained weights as they stood; of a sharded model this process's part.

    Costs one copy of what is trained in host memory: adapters under LoRA, else the model.
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
        """While active, the model has these weights."""
        now = Weights.of(model)
        self.put_into(model)
        try:
            yield
        finally:
            now.put_into(model)

    def save(self, path: Path) -> None:
        """Write the copy as safetensors."""
        save_file({n: v.contiguous() for n, v in self.values.items()}, path)

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> Weights:
        """Read a copy of this model's weights.

        Raises:
            ModelError: the file cannot be read, or holds other parameters.
        """
        try:
            values = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: cannot be read ({error}); delete the checkpoint that holds it"
            ) from None
        trained = _trained(model)
        if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in trained.items()}:
            raise ModelError(
                f"{path}: holds other parameters than are trained; delete the checkpoint that holds it"
            )
        return cls(values)
