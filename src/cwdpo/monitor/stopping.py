"""Early stopping by rules about readings, with a rollback to the last measurement for which no rule held."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cwdpo.dynamics.rules import Rule, Violation, first_violation, parse_rule
from cwdpo.dynamics.series import Series
from cwdpo.monitor.instruments import ProbeCallback
from cwdpo.trainer.weights import Weights
from cwdpo.waiting import from_first

_logger = logging.getLogger(__name__)


class Stopping(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends a stage when a rule holds, and restores the weights of the last measurement at which no rule held.

    These healthy weights (one copy of the trained parameters, replaced at every healthy measurement) are kept in host
    memory. Each checkpoint also contains them as ``healthy-<process>.safetensors``, so that a resumed run rolls back to
    the same step as an uninterrupted one. The weights at which a rule held are never saved as a checkpoint.

    Under DeepSpeed there is no rollback, because the optimizer keeps its own copy of the parameters.

    Args:
        probes: makes the measurements; must be called before this callback.
    """

    def __init__(self, probes: ProbeCallback) -> None:
        self.probes, self.stage = probes, probes.stage
        recipe = self.stage.recipe
        self.rules: list[Rule] = [parse_rule(text, recipe.probes.extra) for text in recipe.stop]
        self.healthy: Weights | None = None
        self.healthy_step = -1
        self._file = "healthy-0.safetensors"
        self._every_process = False

    @cached_property
    def entropy(self) -> float | None:
        """At the start of the stage, nats per token; read from the run, because a resumed stage begins later."""
        return Series(self.stage.run.readings(), ()).entropy(self.stage.name)

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``; the weights are in a file next to it."""
        return {"args": {}, "attributes": {"healthy_step": self.healthy_step}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take the weights at the start as healthy; a resumed stage loads the healthy weights of its checkpoint."""
        # The checkpoint of a run without rules has no state of this callback, but the Trainer expects one when saving.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self._every_process = any(hasattr(p, "device_mesh") for p in model.parameters())
        if self._every_process:
            self._file = f"healthy-{args.process_index}.safetensors"
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            _logger.warning(
                "stop: under DeepSpeed a stage that ends early is not rolled back to its last healthy weights"
            )
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self._file
        if state.global_step and checkpoint.is_file() and kept["healthy_step"] >= 0:
            self.healthy, self.healthy_step = Weights.load(checkpoint, model), int(kept["healthy_step"])
        else:
            self.healthy, self.healthy_step = Weights.of(model), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check the rules if there was a measurement at this step."""
        if self.probes.last_step != state.global_step:
            return
        # All processes follow the first one: their readings may differ in the last bits, but none may stop alone.
        found = from_first(first_violation(self.rules, self.probes.last, self.entropy), "the rules to stop")
        if found is not None:
            self._stop(found, model, control)
        elif self.healthy is not None:
            self.healthy, self.healthy_step = Weights.of(model), state.global_step

    def _stop(self, found: Violation, model: nn.Module, control: Any) -> None:
        step = found.step
        if self.healthy is not None:
            self.healthy.put_into(model)
            step = self.healthy_step
        control.should_training_stop = True
        control.should_save = False
        name = self.stage.name
        reason = f"{name} ends early: {found.words()}; back to the weights of step {step}"
        self.stage.listener.note(reason)
        self.stage.run.write_json(
            f"stopped-{name}.json",
            {
                "stage": name, "step": found.step, "rolled_back_to": step, "rule": found.rule.text,
                "reading": found.rule.reading, "value": found.value, "n": found.n, "reason": reason,
            },
        )  # fmt: skip

    def add_to_checkpoint(self, folder: Path) -> None:
        """Write the last healthy weights into a checkpoint folder; every process calls this."""
        if self.healthy is not None and (self.stage.run.writes or self._every_process):
            self.healthy.save(folder / self._file)
