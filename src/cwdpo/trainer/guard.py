"""Stops a run before a non-finite update, and skips updates with a gradient spike.

All processes decide the same, because every flag and every gradient norm is reduced over processes first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.errors import NonFiniteError
from cwdpo.files.writing import write_json
from cwdpo.models.sharding import local_part
from cwdpo.objectives.base import ObjectiveOutput, ScoredPairs

Found = Literal["loss", "gradient", "parameter"]
FILE = "nonfinite.json"
MOST_NAMES = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of the current step, with its loss."""

    batch: PromptBatch
    pairs: ScoredPairs
    output: ObjectiveOutput

    def to_json(self, process: int) -> dict[str, Any]:
        """The loss, its parts, and the lengths of every example in tokens, as JSON."""
        return {
            "process": process,
            "loss": _number(self.output.loss),
            "parts": {name: _number(value) for name, value in self.output.parts.items()},
            "examples": [self._example(i) for i in range(len(self.batch.example_ids))],
        }

    def _example(self, prompt: int) -> dict[str, Any]:
        own = (self.pairs.prompt == prompt).nonzero().flatten()
        scores = torch.cat([self.pairs.chosen.sum_logp[prompt][None], self.pairs.rejected.sum_logp[own]])
        return {
            "id": self.batch.example_ids[prompt],
            "prompt_tokens": len(self.batch.prompts[prompt].input_ids),
            "chosen_tokens": int(self.pairs.chosen.n_tokens[prompt]),
            "negative_tokens": self.pairs.rejected.n_tokens[own].tolist(),
            "finite": bool(scores.isfinite().all()),
        }


class Guard(TrainerCallback):  # type: ignore[misc]
    """Checks the loss of every micro-batch, the gradient of every step, and the parameters after every update.

    A gradient norm above ``spike_factor`` times the median of the last ``spike_window`` norms is a spike. Its update is
    skipped, including momentum and weight decay; the step count and the learning-rate schedule continue. The rule
    starts when the window is full. Norms of spikes enter the window too, so a lasting increase is accepted after half a
    window. The window is stored in ``trainer_state.json`` and restored on resume.

    With DeepSpeed the update is part of the backward pass, so only loss and parameters are checked here. With fp16
    gradients are not checked: the loss scaler skips non-finite ones.

    Args:
        folder: where ``nonfinite.json`` is written.
        spike_factor: ``None`` switches the spike rule off.
        spike_window: number of steps in the median.
    """

    def __init__(self, folder: Path, spike_factor: float | None = None, spike_window: int = 50) -> None:
        self.folder, self.spike_factor, self.spike_window = folder, spike_factor, spike_window
        self.accelerator: Accelerator | None = None
        self.norms: list[float] = []
        self.skipped = 0
        self._spike = False
        self._seen: list[MicroBatch] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Restore the window of a resumed run; raise an error if the weights are not finite."""
        kept = state.stateful_callbacks.get("spikes", {})
        self.norms, self.skipped = list(kept.get("norms", [])), int(kept.get("skipped", 0))
        self._seen.clear()
        if self._main:
            (self.folder / FILE).unlink(missing_ok=True)
        self._check_parameters(model, list(model.named_parameters()), state.global_step)

    def check_loss(self, model: nn.Module, seen: MicroBatch, step: int) -> None:
        """Check the loss of one micro-batch of ``step``; all processes call this together.

        Raises:
            NonFiniteError: on every process, if the loss is not finite on any process.
        """
        self._seen.append(seen)
        if self._anywhere(not bool(torch.isfinite(seen.output.loss))):
            # Non-finite weights make every loss non-finite; then report the weights.
            names = _named(model.named_parameters(), lambda p: p)
            self._stop("parameter" if self._anywhere(bool(names)) else "loss", names, step)

    def check_gradient(self, model: nn.Module, step: int) -> None:
        """Check the gradient of ``step`` before it is clipped; all processes call this together.

        Raises:
            NonFiniteError: on every process, if its norm is not finite.
        """
        assert self.accelerator is not None
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if deepspeed or self.accelerator.scaler is not None:
            return
        norm = gradient_norm(model)
        if self.accelerator.num_processes > 1:  # equal to the last bit: no process may skip an update alone
            norm = self.accelerator.reduce(norm, "mean")
        if not math.isfinite(norm):
            self._stop("gradient", _named(model.named_parameters(), lambda p: p.grad), step)
        if self.spike_factor is not None:
            self._check_spike(float(norm), step)

    def _check_spike(self, norm: float, step: int) -> None:
        assert self.spike_factor is not None
        usual = median(self.norms) if len(self.norms) >= self.spike_window else 0.0
        self._spike = usual > 0 and norm > self.spike_factor * usual
        self.norms = [*self.norms, norm][-self.spike_window :]
        if self._spike:
            self.skipped += 1
            if self._main:
                ids = ", ".join(i for seen in self._seen for i in seen.batch.example_ids)
                _logger.warning(
                    "step %d: gradient norm %.4g is over %g times the median %.4g of the last %d steps: the update "
                    "is skipped (examples %s)",
                    step, norm, self.spike_factor, usual, self.spike_window, ids,
                )  # fmt: skip

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Remove the gradients of a spike: an optimizer does not change parameters without a gradient."""
        if self._spike:
            optimizer.zero_grad()
            self._spike = False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check the parameters after the update, before they are saved."""
        if self.spike_factor is not None:
            state.stateful_callbacks["spikes"] = {"norms": self.norms, "skipped": self.skipped}
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._check_parameters(model, trained, state.global_step)
        self._seen.clear()

    @torch.no_grad()
    def _check_parameters(
        self, model: nn.Module, parameters: Sequence[tuple[str, Tensor]], step: int
    ) -> None:
        own = [local_part(p) for _, p in parameters if p.is_floating_point()]
        largest = get_total_norm([p for p in own if p.numel()], norm_type=math.inf)  # a shard may be empty
        if self._anywhere(not math.isfinite(largest)):
            self._stop("parameter", _named(parameters, lambda p: p), step)

    def _anywhere(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        assert self.accelerator is not None
        if self.accelerator.num_processes == 1:
            return flag
        count = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return float(count) > 0

    @property
    def _main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def _stop(self, found: Found, names: Sequence[str], step: int) -> None:
        """Gather the micro-batches of all processes, write ``nonfinite.json``, and raise the error on every process."""
        assert self.accelerator is not None
        own = [seen.to_json(self.accelerator.process_index) for seen in self._seen]
        if found == "loss":
            own = [row for row in own if isinstance(row["loss"], str)]
        shards: list[Any] = [(own, list(names))]
        if self.accelerator.num_processes > 1:
            shards = gather_object(shards)
        batches = [row for rows, _ in shards for row in rows]
        merged = list(dict.fromkeys(name for _, found_there in shards for name in found_there))
        if self._main:
            write_json(
                self.folder / FILE,
                {
                    "step": step,
                    "found_in": found,
                    "parameters": merged[:MOST_NAMES],
                    "n_parameters": len(merged),
                    "micro_batches": batches,
                },
            )
        raise NonFiniteError(_message(found, step, batches, merged, self.folder / FILE))


def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm of all gradients, sharded or not: the same scalar on every process. The gradients are not changed."""
    from torch.distributed.tensor import DTensor

    # Gradients sharded over different meshes cannot be combined directly: take the norm per mesh, then of the norms.
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter.grad)
    norms = [get_total_norm(gradients) for gradients in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def _named(parameters: Any, part: Callable[[Tensor], Tensor | None]) -> list[str]:
    """Names of the parameters whose ``part`` is not finite on this process."""
    values = ((name, part(parameter)) for name, parameter in parameters)
    return [
        name.removeprefix("module.")  # DDP's
        for name, value in values
        if value is not None and not bool(local_part(value.detach()).isfinite().all())
    ]


def _number(value: Tensor) -> float | str:
    """The value as a number; as text if it is not finite, because JSON has no NaN."""
    number = float(value.detach())
    return number if math.isfinite(number) else str(number)


def _message(found: Found, step: int, batches: Sequence[Any], names: Sequence[str], file: Path) -> str:
    examples = [e for batch in batches for e in batch["examples"]]
    bad = [e["id"] for e in examples if not e["finite"]] or [e["id"] for e in examples]
    on = f" on examples {', '.join(bad)}" if bad else ""
    first = f" ({', '.join(names[:MOST_NAMES])}; {len(names)} parameters in all)" if names else ""
    what = {
        "loss": f"the loss is {batches[0]['loss'] if batches else 'not finite'}{on}; nothing was updated",
        "gradient": f"the gradient is not finite{first}{on}; nothing was updated",
        "parameter": f"parameters are not finite{first}{on}; nothing more is updated or saved",
    }[found]
    return (
        f"step {step}: {what}. Lengths and loss parts: {file}. Lower the learning rate, or check these rows with "
        "`cwdpo validate`; the last checkpoint is unchanged"
    )
