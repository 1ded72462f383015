"""Training of 16-bit weights: an optimizer without rounding losses, and metrics of how much of the updates is lost.

A bf16 weight has 8 significant bits. AdamW changes a weight by about the learning rate. So at 1e-6, nearly every update
of a weight above 3e-4 is smaller than half of the distance to the next bf16 number, and is rounded away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from cwdpo.arguments import Optimizer
from cwdpo.errors import RecipeError, optional_package

SAMPLED = 1024
"""Largest number of weights per tensor that are measured."""


def optimizer_class(name: Optimizer, args: Any) -> tuple[type, dict[str, Any]] | None:
    """The class of a recipe's optimizer and its settings; ``None`` for transformers' AdamW.

    ``adamw_kahan`` (optimi) stores the rounding error of each weight in a second bf16 tensor and adds it to the next
    update. With moments in bf16 it takes 10 bytes per weight, with the gradient; float32 weights with AdamW take 16.

    Raises:
        MissingPackageError: the package is not installed.
    """
    if name == "adamw":
        return None
    optimi = optional_package("optimi", "train.optimizer: adamw_kahan", "pip install 'cwdpo[bf16]'")
    return optimi.AdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "kahan_sum": True,
    }


def check_optimizer(name: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer for bf16 weights if no trained weight is bf16.

    Raises:
        RecipeError: with the setting and the remedy.
    """
    if name != "adamw" and not any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad):
        raise RecipeError(
            f"train.optimizer: {name} is for trained weights in bf16, but no trained weight is bf16: set "
            "train.optimizer to adamw, or model.dtype to bfloat16"
        )


@dataclass
class _Watched:
    """Some weights of one tensor: their indices, values before the update, and whether their gradients are not 0."""

    parameter: Tensor
    places: Tensor
    before: Tensor | None = None
    active: Tensor | None = None

    def values(self, optimizer: Any) -> Tensor:
        """The values in float32, with the error that Kahan summation stores."""
        found = self._at(self.parameter)
        kept = optimizer.state.get(self.parameter, {}).get("kahan_comp")
        return found if kept is None else found + self._at(kept)

    def intended(self, optimizer: Any, group: dict[str, Any]) -> Tensor | None:
        """The update computed in float32 from the optimizer's moments; ``None`` if it has no moments."""
        state = optimizer.state.get(self.parameter, {})
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            return None
        first, second = self._at(state["exp_avg"]), self._at(state["exp_avg_sq"])
        if "kahan_comp" not in state:  # optimi's moments are already corrected for bias
            step = float(state["step"])
            first = first / (1 - group["betas"][0] ** step)
            second = second / (1 - group["betas"][1] ** step)
        assert self.before is not None
        return -float(group["lr"]) * (
            first / (second.sqrt() + group["eps"]) + group["weight_decay"] * self.before
        )

    def _at(self, tensor: Any) -> Tensor:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        values: Tensor = local.detach().reshape(-1)[self.places].float()
        return values


class LostUpdates(TrainerCallback):  # type: ignore[misc]
    """Measures how much of the updates of trained 16-bit weights is lost; without such weights nothing is logged.

    ``updates/moved``: share of the weights with a gradient that an update changed. ``updates/kept``: projection of the
    actual updates on the float32 updates: 1 if nothing is lost, 0 if everything is. Both are means over the optimizer
    steps since the last log row, over up to :data:`SAMPLED` evenly spaced weights of every tensor.
    """

    def __init__(self) -> None:
        self._watched: list[_Watched] = []
        self._start()

    def _start(self) -> None:
        self._moved, self._active = 0.0, 0.0
        self._along, self._square = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Choose the weights to measure."""
        self._watched = []
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                n = local.numel()
                places = torch.linspace(0, n - 1, min(n, SAMPLED), dtype=torch.float64, device=local.device)
                self._watched.append(_Watched(parameter, places.long()))
        self._start()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Store the weights before the update."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for one in self._watched:
            gradient = one.parameter.grad
            one.before = None if gradient is None else one.values(optimizer)
            one.active = None if gradient is None else one._at(gradient) != 0

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Compare the weights after the update with the stored ones."""
        if not self._watched:  # float32 weights: nothing to look up at every step
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for one in self._watched:
            group = groups.get(id(one.parameter))
            if one.before is None or one.active is None or group is None:
                continue
            change = (one.values(optimizer) - one.before)[one.active]
            self._moved += float((change != 0).sum())
            self._active += len(change)
            intended = one.intended(optimizer, group)
            if intended is not None:
                intended = intended[one.active]
                self._along += float((change * intended).sum())
                self._square += float((intended * intended).sum())

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Return both metrics over all processes, and reset the sums."""
        if not self._watched:
            return {}
        sums = torch.tensor(
            [self._moved, self._active, self._along, self._square],
            dtype=torch.float64,
            device=accelerator.device if accelerator.device.type != "mps" else "cpu",
        )
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        self._start()
        moved, active, along, square = sums.tolist()
        found = {"updates/moved": moved / active} if active else {}
        return found | ({"updates/kept": along / square} if square else {})
