"""The curriculum of stage 2: selects the negatives of each step, and changes the selection after measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cwdpo.curriculum.base import CURRICULA, Curriculum, Hardness, Plan, next_round
from cwdpo.data.encode.collate import PromptBatch
from cwdpo.data.encode.encoded_rows import reference_means
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.monitor.instruments import ProbeCallback
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import calibrate
from cwdpo.rundir import RunDir
from cwdpo.waiting import from_first

FILE = "curriculum.jsonl"


def hardness_of(
    objective: Objective, examples: Sequence[EncodedExample], *, in_rounds: bool = False
) -> Hardness:
    """The hardness of the examples' negatives, from their reference values.

    If the objective has no floor and tau, they are calibrated from the chosen responses as if these were samples.
    """
    chosen, negatives = (tuple(means.tolist()) for means in reference_means(examples))
    scale = objective.probe_scale()
    if scale.floor is not None and scale.tau is not None:
        return Hardness(scale.floor, scale.tau, negatives, in_rounds)
    floor, tau = calibrate(chosen) if len(chosen) > 1 else (0.0, 1.0)
    return Hardness(floor, tau, negatives, in_rounds)


def in_window(batch: PromptBatch, plan: Plan) -> PromptBatch:
    """The batch with only the negatives in the window; a prompt with none in it keeps the nearest one.

    So no prompt is dropped, and the number of prompts that the loss is divided by does not change.
    """
    means = [batch.completions[i].reference_mean_logp for i in batch.rejected.tolist()]
    keep = [mean is None or plan.takes(mean) for mean in means]
    prompts = batch.pair_prompt.tolist()
    for prompt in sorted(set(prompts) - {p for p, k in zip(prompts, keep, strict=True) if k}):
        own = [i for i, p in enumerate(prompts) if p == prompt]
        keep[min(own, key=lambda i: _distance(means[i], plan))] = True
    return batch.keep_pairs(keep)


def _distance(mean: float | None, plan: Plan) -> float:
    return 0.0 if mean is None else max(plan.low - mean, mean - plan.high, 0.0)


def added_share(run: RunDir, step: int) -> float:
    """What the curriculum's plan at a step adds to the share of on-policy negatives; the same on all processes.

    It is read from the run folder, so that a resumed run prepares its round exactly as before.
    """
    known = [row for row in run.rows(FILE) if row["stage"] == "stage2" and row["step"] <= step]
    return from_first(float(known[-1].get("fresh", 0.0)) if known else 0.0, "reading the curriculum")


class CurriculumCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Updates the plan after each measurement; checkpoints contain the current plan.

    The trainer calls :meth:`select` for every micro-batch before it counts the step. Every change of the plan is a row
    of ``curriculum.jsonl``.

    Args:
        probes: makes the measurements; must be called before this callback.
        rows: the stage's examples with reference values; used until a round provides its own.
    """

    def __init__(self, probes: ProbeCallback, rows: Sequence[EncodedExample]) -> None:
        self.probes, self.stage = probes, probes.stage
        self.curriculum: Curriculum = CURRICULA.build(self.stage.recipe.curriculum)
        self._rows = rows
        self.plan = next_round(self.curriculum, None, {}, self.hardness())

    def hardness(self) -> Hardness:
        """The hardness of the negatives that are trained on now, with the current objective's floor and tau."""
        stage, rows = self.stage, self._rows
        if stage.in_rounds and stage.trainer is not None:
            rows = list(stage.trainer.train_dataset) or rows
        return hardness_of(stage.objective, rows, in_rounds=stage.in_rounds)

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``."""
        return {"args": {}, "attributes": {"plan": self.plan.to_json()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the plan of a resumed stage."""
        known = type(self).__name__ in state.stateful_callbacks
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step and known:
            self.plan = Plan.from_json(kept["plan"])
        else:
            self._note(state.global_step, self.hardness())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the plan if there was a measurement at this step."""
        if self.probes.last_step != state.global_step or control.should_training_stop:
            return
        readings = {name: reading.value for name, reading in self.probes.last.items()}
        hardness = self.hardness()
        # All processes use the plan of the first one: their readings may differ in the last bits.
        plan = from_first(next_round(self.curriculum, self.plan, readings, hardness), "the curriculum")
        if plan != self.plan:
            self.plan = plan
            self._note(state.global_step, hardness)

    def _note(self, step: int, hardness: Hardness) -> None:
        taken = sum(map(self.plan.takes, hardness.mean_logps))
        row = {"stage": self.stage.name, "step": step, **self.plan.to_json()}
        self.stage.run.append(FILE, [{**row, "negatives": taken, "of": len(hardness.mean_logps)}])

    def select(self, batch: PromptBatch) -> PromptBatch:
        """The micro-batch with only the negatives that the plan selects."""
        return in_window(batch, self.plan)
