"""Loss and metrics of a trainer on held-out examples, for the ``eval_*`` metrics of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object

from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError, RecipeError
from cwdpo.objectives.base import StepTotals
from cwdpo.scoring.ahead import batches_ahead
from cwdpo.scoring.pairs import scored_pairs
from cwdpo.scoring.score import score
from cwdpo.trainer.metrics import StepMetrics

if TYPE_CHECKING:
    from cwdpo.trainer.trainer import PreferenceTrainer

_OF_TRAINING = ("gradient/", "tokens/")
"""Prefixes of metrics that describe a training step only."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The objective's loss and metrics on held-out examples.

    Attributes:
        loss: the loss of all examples together, as if they were one step.
        metrics: by the names of the training metrics (``rewards/*``, ``logps/*``, ...).
        rewards: [P, 2] implicit rewards of chosen and rejected of each pair, in the order of the examples; sum_logp in
            nats if the objective has no reference.
        n: number of prompts.
    """

    loss: float
    metrics: dict[str, float]
    rewards: np.ndarray[Any, Any]
    n: int


@torch.no_grad()
def held_out_loss(trainer: PreferenceTrainer, rows: Sequence[EncodedExample], batch_size: int) -> HeldOutLoss:
    """Score held-out examples with the current policy and compute the objective's loss over all of them.

    Each process scores a part of the examples. The loss is that of one step over all examples, so it depends neither on
    the batch size nor on the number of processes.

    Args:
        trainer: its policy and objective are used.
        rows: held-out examples, with reference values if the objective needs them.
        batch_size: prompts per forward pass.

    Raises:
        DataError: there are no examples.
        RecipeError: the model is sharded (FSDP2, ZeRO-3).
    """
    if not rows:
        raise DataError("eval_dataset: it has no usable row; give a data set with at least one")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError(
            "eval_dataset: a sharded model (FSDP2, DeepSpeed) cannot be evaluated during training; leave eval_dataset "
            "out, and run cwdpo evaluate on the trained model"
        )
    accelerator = trainer.accelerator
    own = range(accelerator.process_index, len(rows), accelerator.num_processes)
    chunks = [list(own[i : i + batch_size]) for i in range(0, len(own), batch_size)]
    batches = [collate([rows[k] for k in chunk]) for chunk in chunks]
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = model.training
    model.eval()
    try:
        with torch.autocast(accelerator.device.type, dtype=torch.bfloat16, enabled=trainer.args.bf16):
            return _evaluated(trainer, model, batches, chunks, len(rows))
    finally:
        model.train(training)


def _evaluated(
    trainer: PreferenceTrainer,
    model: torch.nn.Module,
    batches: Sequence[PromptBatch],
    chunks: Sequence[Sequence[int]],
    n: int,
) -> HeldOutLoss:
    objective, sums = trainer.objective, StepMetrics()
    totals = _totals(trainer, model, batches)
    sums.begin_step()
    loss = 0.0
    rewards: list[tuple[int, tuple[float, float]]] = []
    for batch, chunk in zip(batches_ahead(model, batches), chunks, strict=True):
        tokens = score(model, batch, stats=objective.token_stats)
        pairs = scored_pairs(batch, tokens, totals)
        output = objective(pairs)
        loss += float(output.loss)
        sums.add(batch, tokens, pairs, output)
        chosen = output.per_pair.get("rewards/chosen")
        rejected = output.per_pair.get("rewards/rejected")
        if chosen is None or rejected is None or len(chosen) != len(pairs.prompt):
            chosen, rejected = pairs.chosen.sum_logp[pairs.prompt], pairs.rejected.sum_logp
        both = torch.stack([chosen.float(), rejected.float()], 1).tolist()
        rewards += [(chunk[p], (a, b)) for p, (a, b) in zip(pairs.prompt.tolist(), both, strict=True)]
    several = trainer.accelerator.num_processes > 1
    parts = gather_object([(loss, rewards)]) if several else [(loss, rewards)]
    metrics = sums.flush(trainer.accelerator)
    ordered = sorted((pair for _, share in parts for pair in share), key=lambda pair: pair[0])
    return HeldOutLoss(
        sum(part for part, _ in parts),
        {name: value for name, value in metrics.items() if not name.startswith(_OF_TRAINING)},
        np.array([both for _, both in ordered], dtype=np.float32).reshape(-1, 2),
        n,
    )


def _totals(trainer: PreferenceTrainer, model: torch.nn.Module, batches: Sequence[PromptBatch]) -> StepTotals:
    """Counts over the examples of all processes, and the values of an objective that looks ahead."""
    counts = [
        float(sum(b.n_paired_prompts for b in batches)),
        float(sum(b.n_chosen_tokens for b in batches)),
        float(sum(b.n_rejected_tokens for b in batches)),
    ]
    ahead: list[float] = []
    if trainer.objective.looks_ahead:
        for batch in batches_ahead(model, batches):
            ahead += list(trainer.objective.ahead(scored_pairs(batch, score(model, batch))))
    if trainer.accelerator.num_processes > 1:
        shards = gather_object([(counts, ahead)])
        counts = [sum(values) for values in zip(*(shard[0] for shard in shards), strict=True)]
        ahead = [value for shard in shards for value in shard[1]]
    prompts, chosen, rejected = counts
    looked = tuple(ahead) if trainer.objective.looks_ahead else None
    return StepTotals(max(prompts, 1.0), chosen, rejected, ahead=looked, memory=trainer.memory.values)
