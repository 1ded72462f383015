"""Merges an adapter into its base, and counts the updates that are lost by rounding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Rounding:
    """Numbers of weights: ``moved`` changed in training; ``undone`` of these are rounded back to the base's value."""

    moved: int = 0
    undone: int = 0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.moved + other.moved, self.undone + other.undone)

    @property
    def share(self) -> float:
        """Share of the changed weights that are rounded back, 0 to 1."""
        return self.undone / self.moved if self.moved else 0.0


@contextmanager
def tied_layers_handled() -> Iterator[None]:
    """Without peft's warnings about adapters on tied embeddings; :func:`merge` handles these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings")
        warnings.filterwarnings("ignore", message=r".*are no longer tied after merging")
        yield


def merge(wrapped: Any) -> nn.Module:
    """The base of a peft model with every adapter merged into its weights, and nothing frozen.

    If input embeddings and output head are one matrix, and the adapter changes only one of them or both differently,
    the head gets its own weight and the config ``tie_word_embeddings: false``: one matrix could not represent both.
    """
    base = wrapped.get_base_model()
    was_tied = _is_tied(base)
    kept_tied = any(getattr(one, "ensure_weight_tying", False) for one in wrapped.peft_config.values())
    if was_tied and any(map(_has_adapter, _ends(base))):
        _untie(base)
    with tied_layers_handled():
        plain: Any = wrapped.merge_and_unload()
    if was_tied and not _is_tied(plain):
        _tie_or_say(plain, tie=kept_tied)
    plain.requires_grad_(True)  # peft leaves the base frozen after the merge
    return plain  # type: ignore[no-any-return]


def _ends(base: Any) -> list[Any]:
    """Input embeddings and output head, if the model has them."""
    return [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]


def _has_adapter(module: Any) -> bool:
    return any(hasattr(module, name) for name in ("base_layer", "modules_to_save", "token_adapter"))


def _bare(module: Any) -> Any:
    """The original layer inside an adapter layer."""
    for name in ("base_layer", "original_module"):
        if hasattr(module, name):
            return _bare(getattr(module, name))
    return module


def _is_tied(base: Any) -> bool:
    ends = [_bare(m).weight for m in _ends(base)]
    return len(ends) == 2 and ends[0].data_ptr() == ends[1].data_ptr()


def _untie(base: Any) -> None:
    from torch import nn

    head = _bare(base.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _tie_or_say(plain: Any, *, tie: bool) -> None:
    """Tie both again if peft trained one matrix (``ensure_weight_tying``); else set them as untied in the config."""
    embeddings, head = _ends(plain)
    if tie:
        head.weight = embeddings.weight
    for one in (plain.config, plain.config.get_text_config(decoder=True)):
        if hasattr(one, "tie_word_embeddings"):
            one.tie_word_embeddings = tie


def rounding_of_adapter(wrapped: Any, dtype: torch.dtype) -> Rounding:
    """How many of an adapter's updates are lost if the merged weights are cast to ``dtype``; nothing is merged.

    Args:
        wrapped: a peft model in float32.
        dtype: dtype of the merged weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    total = Rounding()
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            base = module.get_base_layer().weight.detach()
            for adapter in module.active_adapters:
                if adapter in module.scaling:  # type: ignore[operator]
                    total += rounding(base, base + module.get_delta_weight(adapter).detach(), dtype)
        elif isinstance(module, ModulesToSaveWrapper):
            for kept in module.modules_to_save.values():
                pairs = zip(module.original_module.parameters(), kept.parameters(), strict=True)
                for before, after in pairs:
                    total += rounding(before.detach(), after.detach(), dtype)
    return total


def rounding(before: Tensor, after: Tensor, dtype: torch.dtype) -> Rounding:
    """How many updates of one tensor are lost by casting to ``dtype``; ``before`` and ``after`` have the same shape."""
    moved = before != after
    undone = moved & (before.to(dtype) == after.to(dtype))
    return Rounding(int(moved.sum()), int(undone.sum()))
