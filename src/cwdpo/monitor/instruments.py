"""Held-out measurements while a stage trains: what is measured when, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import TrainerCallback

from cwdpo.config import Recipe
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedExample, Encoder
from cwdpo.errors import RecipeError
from cwdpo.models.load import Policy
from cwdpo.models.sample import Sample, sample
from cwdpo.models.shared_attention import shares_prefix
from cwdpo.monitor.influence import one_step
from cwdpo.monitor.probe_set import Load, Prompts, as_chosen, build_prompts, sequence_tokens
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.probes.base import PROBES, HeldOut, ProbeSet, Scale, with_responses
from cwdpo.records import Example, Reading
from cwdpo.rundir import RunDir
from cwdpo.stage.prepare import autocast
from cwdpo.trainer.weights import Weights


def scale_of(objective: Objective) -> Scale:
    """What the probes need of the objective."""
    beta = getattr(objective, "beta", None)
    if not isinstance(objective, CwDpo):
        return Scale(beta=beta)
    if objective.cooling == "constant":
        return Scale(beta=beta, weight=objective.constant_weight)
    assert objective.floor != "auto"
    assert objective.tau != "auto"
    return Scale(objective.floor, objective.tau, beta)


@dataclass
class Instruments:
    """Everything that measures a stage on held-out prompts.

    Attributes:
        probes: the pass over chosen, negatives and further responses.
        prompts: what is probed.
        updates: training examples for the one-step influence; empty for none.
        start: weights of the stage's start; kept only where ``on_policy`` needs them.
        seconds: spent so far on measuring.
    """

    policy: Policy
    encoder: Encoder
    recipe: Recipe
    objective: Objective
    prompts: Prompts
    probes: ProbeSet
    updates: Sequence[EncodedExample] = ()
    start: Weights | None = None
    seconds: float = 0.0
    _texts: list[tuple[str, bool]] = field(default_factory=list)

    def measure(self, model: nn.Module, step: int) -> HeldOut:
        """One measurement of the policy as it stands."""
        scale = scale_of(self.objective)
        held = self.probes.measure(model, step, scale) if step else self.probes.at_start(scale)
        texts = [r.text for own in self.prompts.responses.values() for r in own if r.type == "chosen_initial"]
        if texts and step == 0:
            held = replace(held, sampled={"chosen_initial": [(text, True) for text in texts]})
        if self.start is not None:
            held = self._with_fresh_samples(model, held, step)
        if self.updates:
            held = replace(held, one_step=self._one_step(model))
        return held

    def _with_fresh_samples(self, model: nn.Module, held: HeldOut, step: int) -> HeldOut:
        assert self.start is not None
        asked = [e for e in self.prompts.examples if e.id in self.prompts.responses]
        drawn = draw(model, self.encoder, asked, self.recipe, self.recipe.seed + step)
        examples = as_chosen(self.encoder, asked, [s.text for s in drawn], "on_policy")
        if not examples:
            return held
        with self.start.in_force(model):
            fresh = ProbeSet(examples, model)
        held = held.plus(fresh.measure(model, step), "on_policy")
        return replace(held, sampled={**held.sampled, "on_policy": [(s.text, s.ended) for s in drawn]})

    def _one_step(self, model: nn.Module) -> Any:
        chosen = [e for e in self.prompts.encoded if e.id in self.prompts.responses] or self.prompts.encoded[
            :4
        ]
        with_extras = [with_responses(e, self.prompts.extras.get(e.id, ())) for e in chosen[:8]]
        kinds = [k for e in with_extras for k in ("chosen", *(c.kind or "rejected" for c in e.negatives))]
        return one_step(
            model, collate(with_extras), kinds, [collate([u]) for u in self.updates], self.objective
        )

    @property
    def responses(self) -> int:
        """Responses of one measurement, on-policy ones aside."""
        return sum(
            1 + len(e.negatives) + len(self.prompts.extras.get(e.id, ())) for e in self.prompts.encoded
        )


def draw(
    model: nn.Module, encoder: Encoder, examples: Sequence[Example], recipe: Recipe, seed: int
) -> list[Sample]:
    """One sample of the policy as it stands for each prompt, temperature 1."""
    drawn: list[Sample] = sample(
        model, encoder, examples, max_new_tokens=recipe.probes.max_new_tokens, seed=seed
    )
    return drawn


def instruments(
    policy: Policy,
    encoder: Encoder,
    recipe: Recipe,
    stage: str,
    objective: Objective,
    validation: Sequence[Example],
    training: Sequence[Example],
    encoded: Sequence[EncodedExample],
    run: RunDir,
    *,
    resume: bool = False,
) -> Instruments | None:
    """Set up a stage's measurements; the policy as it stands is the start. ``None`` without a held-out prompt.

    Args:
        training, encoded: the stage's examples.
    """
    began = time.perf_counter()
    settings, train = recipe.probes, recipe.train
    own = recipe.stage1 if stage == "stage1" else recipe.stage2
    per_step = train.batch_size * train.gradient_accumulation_steps
    steps = own.steps or math.ceil(own.epochs * len(encoded) / per_step)
    shared = shares_prefix(policy.model)
    trained = encoded if objective.needs_negatives else [replace(e, negatives=()) for e in encoded]
    one_pass = sum(sequence_tokens(e, shared=shared) for e in trained)
    load = Load(per_step * one_pass / len(encoded), steps, shared)
    prompts = build_prompts(
        encoder, validation, training, settings, load,
        lambda asked: [s.text for s in draw(policy.model, encoder, asked, recipe, recipe.seed)],
        run, stage, recipe.seed, resume=resume,
    )  # fmt: skip
    if not prompts.encoded:
        return None
    return Instruments(
        policy,
        encoder,
        recipe,
        objective,
        prompts,
        ProbeSet(prompts.encoded, policy.model, extras=prompts.extras),
        [e for e in encoded if e.negatives or not objective.needs_negatives][: settings.influence],
        Weights.of(policy.model) if "on_policy" in settings.types else None,
        time.perf_counter() - began,
    )


Measured = Callable[[str, int, nn.Module], None]
Read = Callable[[str, dict[str, Reading]], None]


class ProbeCallback(TrainerCallback):  # type: ignore[misc]
    """Measures every few steps and at the ends, and writes the readings to the run.

    Attributes:
        last: the readings of the last measurement by name, for what follows from them.
        last_step: when that was; -1 before the first.
        reports: told the values by ``probe/<name>``, for trackers.
    """

    def __init__(self, found: Instruments, run: RunDir, stage: str, hears: Measured, reads: Read) -> None:
        self.instruments, self.run, self.stage = found, run, stage
        self.hears, self.reads = hears, reads
        self.reports: Callable[[dict[str, float]], None] = lambda values: None
        self.every = found.recipe.probes.every
        self.probes = [PROBES.build(name) for name in PROBES.names()]
        self.last: dict[str, Reading] = {}
        self.last_step = -1
        self._began = 0.0

    def _measure(self, model: Any, step: int, bf16: bool) -> None:
        began = time.perf_counter()
        with autocast(model, bf16):
            held = self.instruments.measure(model, step)
        readings = [reading for probe in self.probes for reading in probe(held)]
        self.run.append_readings(self.stage, readings)
        self.last, self.last_step = {r.name: r for r in readings}, step
        self.instruments.seconds += time.perf_counter() - began
        self.reads(self.stage, self.last)
        self.reports({f"probe/{r.name}": r.value for r in readings if r.value is not None})
        self.hears(self.stage, step, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Readings at step 0.

        Raises:
            RecipeError: fresh samples or influence are asked for of a sharded model.
        """
        asked = [
            name
            for name, on in (
                ("types: on_policy", self.instruments.start),
                ("influence", self.instruments.updates),
            )
            if on
        ]
        sharded = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())
        if sharded and asked:
            raise RecipeError(
                f"probes.{asked[0]}: not for a model that is sharded over processes (FSDP2, DeepSpeed); leave it out"
            )
        self._began = time.perf_counter()
        if state.global_step == 0:
            self._measure(model, 0, args.bf16)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Readings every ``every`` steps and at the last one."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, state.global_step, args.bf16)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What measuring took, next to the whole."""
        seconds, spent = time.perf_counter() - self._began, self.instruments.seconds
        self.run.append("timings.jsonl", [{
            "stage": self.stage, "step": state.global_step, "probe_seconds": round(spent, 3),
            "seconds": round(seconds, 3), "probe_share": round(spent / seconds, 4) if seconds else None,
            "probe_prompts": len(self.instruments.prompts.encoded), "probe_responses": self.instruments.responses,
        }])  # fmt: skip
