"""Held-out measurements during a stage: what is measured, when, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn
from transformers import TrainerCallback

from cwdpo.clock import spent_on
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import RecipeError
from cwdpo.models.sample import sample
from cwdpo.models.sharding import is_sharded
from cwdpo.monitor.influence import one_step
from cwdpo.monitor.probe_pass import MOST_AT_ONCE, ProbeSet, with_responses
from cwdpo.monitor.probe_set import Load, Prompts, as_chosen, build_prompts
from cwdpo.probes.base import PROBES, HeldOut, OneStep
from cwdpo.records import Example, Reading, Sample
from cwdpo.stage.stage import Stage
from cwdpo.trainer.weights import Weights

OBSERVED = 8
"""Number of held-out prompts on whose responses the influence of an update is measured."""


@dataclass
class Instruments:
    """Measures a stage on held-out prompts.

    Attributes:
        stage: the stage; its current objective gives floor, tau and beta to the probes.
        prompts: the held-out prompts with their responses.
        probes: scores chosen responses, negatives and further responses.
        updates: training examples whose influence is measured; may be empty.
        start: the weights at the start of the stage; kept only if on-policy samples are measured.
        seconds: time spent on measurements so far.
    """

    stage: Stage
    prompts: Prompts
    probes: ProbeSet
    updates: Sequence[EncodedExample] = ()
    start: Weights | None = None
    seconds: float = 0.0

    def measure(self, model: nn.Module, step: int) -> HeldOut:
        """Measure the current policy at an optimizer step."""
        scale = self.stage.objective.probe_scale()
        held = self.probes.measure(model, step, scale) if step else self.probes.at_start(scale)
        initial = [(text, True) for text in self.prompts.texts("chosen_initial")]
        if initial and step == 0:
            held = replace(held, sampled={"chosen_initial": initial})
        if self.start is not None:
            held = self._with_fresh_samples(model, held, step)
        if self.updates:
            held = replace(held, one_step=self._one_step(model))
        return held

    def _with_fresh_samples(self, model: nn.Module, held: HeldOut, step: int) -> HeldOut:
        """Add samples of the current policy, scored with the current weights and with those at the start."""
        assert self.start is not None
        asked = self.prompts.typed
        drawn = draw(self.stage, model, asked, self.stage.recipe.seed + step)
        examples = as_chosen(self.stage.encoder, asked, [s.text for s in drawn], "on_policy")
        if not examples:
            return held
        with self.start.in_force(model):
            fresh = ProbeSet(examples, model, at_once(self.stage))
        held = held.plus(fresh.measure(model, step), "on_policy")
        return replace(held, sampled={**held.sampled, "on_policy": [(s.text, s.ended) for s in drawn]})

    def _one_step(self, model: nn.Module) -> OneStep:
        typed = [e for e in self.prompts.encoded if e.id in self.prompts.responses]
        observed = [
            with_responses(e, self.prompts.extras.get(e.id, ()))
            for e in (typed or self.prompts.encoded[:4])[:OBSERVED]
        ]
        kinds = [k for e in observed for k in ("chosen", *(c.kind or "rejected" for c in e.negatives))]
        updates = [collate([u]) for u in self.updates]
        return one_step(model, collate(observed), kinds, updates, self.stage.objective)


def draw(stage: Stage, model: nn.Module, examples: Sequence[Example], seed: int) -> list[Sample]:
    """One sample of the current policy for each prompt, at temperature 1."""
    most = stage.recipe.probes.max_new_tokens
    size = stage.recipe.evaluation.batch_size
    drawn: list[Sample] = sample(
        model, stage.encoder, examples, max_new_tokens=most, batch_size=size, seed=seed, together=True
    )
    return drawn


def at_once(stage: Stage) -> int:
    """Prompts of a forward pass over the probe set: ``evaluation.batch_size``, at most :data:`MOST_AT_ONCE`."""
    return min(MOST_AT_ONCE, stage.recipe.evaluation.batch_size)


@spent_on("probes")
def instruments(stage: Stage, rows: EncodedRows) -> Instruments | None:
    """Set up the measurements of a stage before it trains; ``None`` if there is no held-out prompt.

    Args:
        stage: the stage; its policy still has the weights of the start.
        rows: training examples with the negatives of the data, and with reference values if the objective uses them.

    Raises:
        RecipeError: ``probes.influence`` is set, but no training example has a negative.
    """
    began = time.perf_counter()
    model, settings, objective = stage.policy.model, stage.recipe.probes, stage.objective
    sizes = rows.row_sizes(shared=stage.shared, negatives=objective.needs_negatives)
    tokens = int(sizes[2].sum())
    load = Load(stage.prompts_per_step * tokens / len(rows), stage.steps(rows), stage.shared)
    prompts = build_prompts(
        stage, load, lambda asked: [s.text for s in draw(stage, model, asked, stage.recipe.seed)]
    )
    if not prompts.encoded:
        return None
    trained = (e for e in rows if e.negatives or not objective.needs_negatives)
    updates = list(islice(trained, settings.influence))
    if settings.influence and not updates:
        raise RecipeError(
            "probes.influence: no training example has a negative before the first round; set it to 0, or use data "
            "with rejected responses"
        )
    probes = ProbeSet(prompts.encoded, model, at_once(stage), extras=prompts.extras)
    start = Weights.of(model) if "on_policy" in settings.types else None
    return Instruments(stage, prompts, probes, updates, start, time.perf_counter() - began)


class ProbeCallback(TrainerCallback):  # type: ignore[misc]
    """Measures at the start, every ``probes.every`` steps and at the end, and writes the readings to the run folder.

    Attributes:
        last: the readings of the last measurement by name, for callbacks that act on them.
        last_step: the step of the last measurement; -1 before the first.
    """

    def __init__(self, instruments: Instruments) -> None:
        self.instruments, self.stage = instruments, instruments.stage
        self.every = self.stage.recipe.probes.every
        extra = self.stage.recipe.probes.extra
        self.probes = [*map(PROBES.build, PROBES.names()), *map(PROBES.build, extra)]
        self.last: dict[str, Reading] = {}
        self.last_step = -1
        self._began = 0.0

    def _measure(self, model: Any, step: int) -> None:
        stage = self.stage
        began = time.perf_counter()
        with spent_on("probes"), stage.autocast(model):
            held = self.instruments.measure(model, step)
            readings = [reading for probe in self.probes for reading in probe(held)]
        stage.run.append_readings(stage.name, readings)
        self.last, self.last_step = {r.name: r for r in readings}, step
        self.instruments.seconds += time.perf_counter() - began
        stage.listener.readings(stage.name, self.last)
        stage.trackers.numbers(stage.name, step, {f"probe/{r.name}": r.value for r in readings})
        stage.listener.measured(stage.name, step, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure at step 0.

        Raises:
            RecipeError: influence is to be measured, but the model is sharded; or on-policy samples, but it was not
                sharded yet when the weights of the start were kept.
        """
        kept = None if is_sharded(self.stage.policy.model) else self.instruments.start
        wanted = {"types: on_policy": kept, "influence": self.instruments.updates}
        asked = [name for name, on in wanted.items() if on]
        sharded = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())
        if sharded and asked:
            raise RecipeError(
                f"probes.{asked[0]}: not possible with a model sharded over processes (FSDP2, DeepSpeed); leave it out"
            )
        # The set-up before is a part of what is spent, and of the time.
        self._began = time.perf_counter() - self.instruments.seconds
        if state.global_step == 0:
            self._measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure every ``every`` steps and at the last step."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log probe time and its share of training time."""
        seconds, spent = time.perf_counter() - self._began, self.instruments.seconds
        prompts = self.instruments.prompts
        self.stage.run.append("timings.jsonl", [{
            "stage": self.stage.name, "step": state.global_step, "probe_seconds": round(spent, 3),
            "seconds": round(seconds, 3), "probe_share": round(spent / seconds, 4) if seconds else None,
            "probe_prompts": len(prompts.encoded), "probe_responses": prompts.n_responses,
        }])  # fmt: skip
