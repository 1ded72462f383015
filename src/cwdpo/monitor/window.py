"""A curriculum within stage 2: which negatives of a step take part, moved at every measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cwdpo.curriculum.base import Curriculum, Hardness, Plan, next_round
from cwdpo.data.encode.collate import PromptBatch
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample
from cwdpo.monitor.instruments import ProbeCallback
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import CwDpo, calibrate
from cwdpo.rundir import RunDir, read_jsonl

FILE = "curriculum.jsonl"


def hardness_of(objective: Objective, examples: Sequence[EncodedExample]) -> Hardness:
    """The scale of a window, from reference values.

    Where the objective has no calibrated floor and tau, they are those that calibration would find if the
    chosen responses were samples.
    """
    found = [[mean for c in e.negatives if (mean := _reference_mean(c)) is not None] for e in examples]
    negatives = tuple(value for own in found for value in own)
    if isinstance(objective, CwDpo) and objective.floor != "auto" and objective.tau != "auto":
        return Hardness(objective.floor, objective.tau, negatives)
    chosen = [mean for e in examples if (mean := _reference_mean(e.chosen)) is not None]
    floor, tau = calibrate(chosen) if len(chosen) > 1 else (0.0, 1.0)
    return Hardness(floor, tau, negatives)


def _reference_mean(completion: EncodedCompletion) -> float | None:
    total = completion.reference_sum_logp
    return None if total is None else total / len(completion.ids)


def in_window(batch: PromptBatch, plan: Plan) -> PromptBatch:
    """The batch with the negatives that lie in the window; a prompt without any keeps its nearest one.

    So no prompt leaves the step, and the number of prompts that a loss is divided by stays.
    """
    means = [_reference_mean(batch.completions[i]) for i in batch.rejected.tolist()]
    keep = [mean is None or plan.takes(mean) for mean in means]
    prompts = batch.pair_prompt.tolist()
    for prompt in sorted(set(prompts) - {p for p, k in zip(prompts, keep, strict=True) if k}):
        own = [i for i, p in enumerate(prompts) if p == prompt]
        keep[min(own, key=lambda i: _distance(means[i], plan))] = True
    return keep_pairs(batch, keep)


def _distance(mean: float | None, plan: Plan) -> float:
    return 0.0 if mean is None else max(plan.low - mean, mean - plan.high, 0.0)


def keep_pairs(batch: PromptBatch, keep: Sequence[bool]) -> PromptBatch:
    """The batch with some of its P pairs; every prompt and chosen response stays."""
    if all(keep):
        return batch
    pairs = torch.tensor(keep, device=batch.rejected.device)
    out = torch.ones(len(batch.completions), dtype=torch.bool, device=pairs.device)
    out[batch.rejected[~pairs]] = False
    moved = out.cumsum(0) - 1
    return replace(
        batch,
        completions=tuple(c for c, kept in zip(batch.completions, out.tolist(), strict=True) if kept),
        completion_prompt=batch.completion_prompt[out],
        chosen=moved[batch.chosen],
        rejected=moved[batch.rejected[pairs]],
        pair_prompt=batch.pair_prompt[pairs],
    )


def added_share(run: RunDir, step: int) -> float:
    """What the curriculum's plan at a step adds to the share of on-policy negatives; the same on all processes.

    Read from the run, so that a round that is prepared again after a resume is the round that was begun.
    """
    known = [row for row in read_jsonl(run.path / FILE) if row["stage"] == "stage2" and row["step"] <= step]
    added: float = broadcast_object_list([known[-1].get("fresh", 0.0) if known else 0.0])[0]
    return added


class CurriculumCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Moves the plan after each measurement; the plan in force survives a resume.

    ``select`` is what the trainer asks for every micro-batch, before it counts the step. Every change is a row of
    ``curriculum.jsonl``.
    """

    def __init__(
        self, curriculum: Curriculum, hardness: Hardness, probes: ProbeCallback, run: RunDir, stage: str
    ) -> None:
        self.curriculum, self.hardness, self.probes = curriculum, hardness, probes
        self.run, self.stage = run, stage
        self.plan = next_round(curriculum, None, {}, hardness)

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        return {"args": {}, "attributes": {"plan": self.plan.to_json()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the plan of a resumed stage."""
        known = type(self).__name__ in state.stateful_callbacks
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step and known:
            self.plan = Plan.from_json(kept["plan"])
        else:
            self._note(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The next plan, where there was a measurement."""
        if self.probes.last_step != state.global_step or control.should_training_stop:
            return
        readings = {name: reading.value for name, reading in self.probes.last.items()}
        # Every process must take the same negatives, whatever the last bits of its readings.
        plan: Plan = broadcast_object_list([next_round(self.curriculum, self.plan, readings, self.hardness)])[
            0
        ]
        if plan != self.plan:
            self.plan = plan
            self._note(state.global_step)

    def _note(self, step: int) -> None:
        taken = sum(map(self.plan.takes, self.hardness.mean_logps))
        row = {"stage": self.stage, "step": step, **self.plan.to_json()}
        self.run.append(FILE, [{**row, "negatives": taken, "of": len(self.hardness.mean_logps)}])

    def select(self, batch: PromptBatch) -> PromptBatch:
        """The micro-batch with the negatives of the plan."""
        return in_window(batch, self.plan)
