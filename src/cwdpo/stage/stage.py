"""A stage in progress: one object with everything that the parts of a stage share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from torch import nn

from cwdpo.config import Recipe, StageSettings
from cwdpo.data.encode.encoder import EncodedExample, Encoder, NegativeSet
from cwdpo.models.load import Policy
from cwdpo.models.shared_attention import shares_prefix
from cwdpo.objectives.base import InForce, Objective
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.stage.trackers import Trackers
from cwdpo.trainer.batching import TokenBatches, all_row_lengths, optimizer_steps

if TYPE_CHECKING:
    from cwdpo.stage.streaming import StageStream
    from cwdpo.trainer.trainer import PreferenceTrainer

StageName = Literal["stage1", "stage2"]


def autocast(model: nn.Module, bf16: bool) -> torch.autocast:
    """The precision of the training step, for everything that is compared with it.

    The Trainer applies autocast only to its own forward pass. A reference scored without it would differ from the
    policy before the first update.
    """
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


def negatives_of(stage: StageName, objective: Objective) -> NegativeSet:
    """Which of an example's negatives a stage trains on."""
    if not objective.uses_negatives:
        return "none"
    return "gentle" if stage == "stage1" else "rejected"


@dataclass
class Stage:
    """One stage of a run, from its examples to its trained policy.

    Attributes:
        name: ``stage1`` or ``stage2``.
        recipe: the run's recipe.
        policy: trained in place; its weights at the start of the stage are the reference.
        encoder: of the policy's checkpoint.
        run: the run folder, for metrics, readings and checkpoints.
        examples: the training examples, with their negatives.
        held_out: the held-out examples, for the probes.
        listener: progress callbacks.
        trackers: experiment trackers; by default none.
        resume: whether to continue from the stage's files in the run folder.
        reference_model: a reference model other than the policy at the start.
        stream: with ``data.streaming``, reads the windows after ``examples``, which are the first one.
        in_force: the current objective; calibrated when the stage is prepared.
        trainer: ``None`` until it is created and after the stage; under FSDP2 it has the weights.
    """

    name: StageName
    recipe: Recipe
    policy: Policy
    encoder: Encoder
    run: RunDir
    examples: Sequence[Example] = ()
    held_out: Sequence[Example] = ()
    listener: Listener = field(default_factory=Listener)
    trackers: Trackers = field(default_factory=Trackers)
    resume: bool = False
    reference_model: nn.Module | None = None
    stream: StageStream | None = None
    in_force: InForce = field(init=False)
    trainer: PreferenceTrainer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.in_force = InForce(self.settings.build())

    @property
    def settings(self) -> StageSettings:
        """The recipe's section of this stage."""
        return self.recipe.stage1 if self.name == "stage1" else self.recipe.stage2

    @property
    def objective(self) -> Objective:
        """The current objective."""
        return self.in_force.objective

    @property
    def negatives(self) -> NegativeSet:
        """Which of an example's negatives this stage trains on."""
        return negatives_of(self.name, self.objective)

    @property
    def in_rounds(self) -> bool:
        """Whether the stage runs in rounds, each with new negatives."""
        return self.name == "stage2" and self.recipe.negatives.on_policy_fraction is not None

    @property
    def shared(self) -> bool:
        """Whether the policy is scored with shared-prefix rows."""
        return shares_prefix(self.policy.model)

    @property
    def prompts_per_step(self) -> int:
        """Number of prompts in one optimizer step over all processes."""
        train = self.recipe.train
        return int(train.batch_size * train.gradient_accumulation_steps * PartialState().num_processes)

    def steps(self, rows: Sequence[EncodedExample | Example]) -> int:
        """Number of optimizer steps of the whole stage on these rows, as the Trainer counts them."""
        train, processes = self.recipe.train, PartialState().num_processes
        if train.max_tokens_per_batch is None:
            batches = math.ceil(len(rows) / (train.batch_size * processes))
        else:
            encoded: Any = rows  # rounds pass examples, and have no token batches
            lengths = all_row_lengths(encoded, shared=self.shared)
            cut = TokenBatches(lengths, train.max_tokens_per_batch, self.recipe.seed, processes)
            batches = len(cut) // processes
        settings = self.settings
        accumulation = train.gradient_accumulation_steps
        return optimizer_steps(settings.steps, settings.epochs, batches, accumulation)

    def autocast(self, model: nn.Module | None = None) -> torch.autocast:
        """See :func:`autocast`; for the policy if no other model is given."""
        return autocast(self.policy.model if model is None else model, self.recipe.train.bf16)

    def current_model(self) -> nn.Module:
        """The policy with its current weights, also during training: whole, or sharded if it was loaded so.

        All processes call this together.
        """
        return self.policy.model if self.trainer is None else self.trainer.trained_model()

    def note_problems(self, texts: Sequence[str], part: str = "") -> None:
        """Write problems to ``problems.jsonl``; they replace earlier ones of the same part of the stage."""
        name = self.name + part
        self.run.drop_stages("problems.jsonl", {name})
        self.run.append("problems.jsonl", ({"stage": name, "problem": text} for text in texts))
