"""A Trainer for models that are sharded before it gets them: transformers and accelerate expect to do it themselves."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers.trainer import SCHEDULER_NAME

from cwdpo.models.saved import load_weights
from cwdpo.models.sharding import is_sharded
from cwdpo.trainer.checkpoints import CompleteCheckpoints, readable
from cwdpo.trainer.plain_reading import PlainReader, deepspeed_parts, load_parts, refuse_values


class ShardedTraining(CompleteCheckpoints):
    """Optimizer and checkpoints of a model that may be sharded already; for other models nothing differs."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Of a sharded model, remember which parameters the optimizer has."""
        made = super().create_optimizer(model)
        groups = made.param_groups if is_sharded(self.model) else ()
        self._trained: list[list[Tensor]] = [list(group["params"]) for group in groups]
        return made

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Called when accelerate has prepared the optimizer: give it its parameters back.

        accelerate finds them by the address of their values. A process whose part of a small parameter is empty has no
        such address, and would get the same parameter for all of them.
        """
        for group, own in zip(
            self.optimizer.param_groups if self._trained else (), self._trained, strict=True
        ):
            group["params"] = own
        return super().create_scheduler(*args, **kwargs)

    def load(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint into the model, without training it."""
        if is_sharded(self.model):
            with readable(checkpoint, "its weights"):
                self._load_from_checkpoint(str(checkpoint), self.model)
        else:
            load_checkpoint(self.model, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint of all weights, with the parameter names that its model family uses on disk.

        transformers' Trainer loads the names of the file with ``strict=False``. Some families, such as LLaVA, are saved
        under other names: nothing would be loaded, and training would continue from the wrong weights.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or model is not None:
            parts = Path(resume_from_checkpoint) / f"{FSDP_MODEL_NAME}_0"
            if parts.is_dir():
                refuse_values(parts)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best checkpoint with :meth:`_load_from_checkpoint`, for the same reason."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with readable(checkpoint, "the state of the optimizer or of the learning rate schedule"):
            _load_optimizer(self.model, self.optimizer, Path(checkpoint) / f"{OPTIMIZER_NAME}_0")
            self.lr_scheduler.load_state_dict(
                torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            )


def load_checkpoint(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a whole model, also if several processes wrote their parts of it.

    What DeepSpeed wrote must have been searched for pickles before (``checkpoint_to_resume``, ``refuse_pickles``).

    Raises:
        FileError: the checkpoint cannot be read.
        ModelError: it does not fit the model.
    """
    parts = checkpoint / f"{FSDP_MODEL_NAME}_0"
    if parts.is_dir():
        with readable(checkpoint, "its weights"):
            refuse_values(parts)
            _join_parts(model, parts)
    elif deepspeed_parts(checkpoint):
        with readable(checkpoint, "what DeepSpeed wrote"):
            _load_of_deepspeed(model, checkpoint)
    else:
        load_weights(model, checkpoint)


def _join_parts(model: nn.Module, parts: Path) -> None:
    """Load what accelerate stored of a sharded model (of a LoRA run, its adapter) into a whole one.

    Raises:
        ValueError: it does not fit the model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    adapter = hasattr(model, "peft_config")
    places: dict[str, Tensor] = get_peft_model_state_dict(model) if adapter else model.state_dict()
    stored = {name.removeprefix("model.") for name in PlainReader(parts).read_metadata().state_dict_metadata}
    values = {name: place for name, place in places.items() if name in stored}
    # A tied head has two names and one place; it is stored once.
    filled = {place.data_ptr() for place in values.values()}
    left_over = sorted(stored - values.keys()) + [
        name for name, place in places.items() if place.data_ptr() not in filled
    ]
    if left_over:
        raise ValueError(f"it does not fit the model: {', '.join(left_over[:3])}")
    load_parts({"model": values}, parts)
    if adapter:
        set_peft_model_state_dict(model, values)


def _load_of_deepspeed(model: nn.Module, checkpoint: Path) -> None:
    """Load what is trained from DeepSpeed's own files: ZeRO-3 leaves the copy of the weights beside them empty."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it describes what it does
        found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(found[name])


def _load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Load the state of an optimizer that accelerate stored.

    accelerate's own function refuses it if some parameter had no gradient in any step so far: it has no state in the
    checkpoint. Here it has none afterwards either, as in a run that was not interrupted.
    """
    stored = PlainReader(folder).read_metadata().state_dict_metadata
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}  # makes the state of every parameter
    load_parts(state, folder, partial=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for name, parameter in model.named_parameters():
        if not any(key.startswith(f"optimizer.state.{name}.") for key in stored):
            optimizer.state.pop(parameter, None)
