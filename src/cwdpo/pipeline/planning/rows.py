"""A sample of a recipe's rows as a stage would train on them, cut into micro-batches."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cwdpo.arguments import TrainSettings
from cwdpo.config import Recipe
from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import EncodedExample, Encoder
from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.scoring.score import row_tokens
from cwdpo.stage.splits import Splits
from cwdpo.stage.stage import StageName, negatives_of
from cwdpo.trainer.batching import TokenBatches, optimizer_steps, row_lengths

TIMED = 8
"""Number of prompts whose images are decoded and processed to time it."""


@dataclass(frozen=True)
class StageRows:
    """What a stage trains on.

    Attributes:
        name: ``stage1`` or ``stage2``.
        sample: encoded rows, a random sample of the stage's.
        rows: estimated number of rows that the stage trains on.
        in_rounds: whether the stage makes new negatives in rounds.
    """

    name: StageName
    sample: Sequence[EncodedExample]
    rows: int
    in_rounds: bool = False

    def batches(self, train: TrainSettings, *, shared: bool) -> list[PromptBatch]:
        """The sample in micro-batches, as the trainer would cut it; those of the fewest tokens first."""
        rows = self.sample
        lengths = [row_lengths(row, shared=shared) for row in rows]
        if train.max_tokens_per_batch is not None:
            cut = [list(own) for own in TokenBatches(lengths, train.max_tokens_per_batch, seed=0)]
        else:
            order = sorted(range(len(rows)), key=lambda i: lengths[i][1] if train.group_by_length else 0)
            order.reverse()  # if the last one is short, it has the shortest rows
            cut = [order[i : i + train.batch_size] for i in range(0, len(order), train.batch_size)]
        made = [collate([rows[i] for i in own]) for own in cut if own]
        return sorted(made, key=lambda batch: row_tokens(batch, shared=shared)[1])

    def steps(self, recipe: Recipe, gpus: int, batches: Sequence[PromptBatch]) -> int:
        """Optimizer steps of the stage on a number of GPUs, if its rows are like the sample."""
        train = recipe.train
        settings = recipe.stage1 if self.name == "stage1" else recipe.stage2
        if train.max_tokens_per_batch is None:
            count = math.ceil(self.rows / (train.batch_size * gpus))
        else:
            count = math.ceil(self.rows / len(self.sample) * len(batches) / gpus)
        return optimizer_steps(
            settings.steps, settings.epochs, max(count, 1), train.gradient_accumulation_steps
        )


def stage_rows(recipe: Recipe, splits: Splits, encoder: Encoder, limit: int) -> list[StageRows]:
    """The rows of the stages that are enabled.

    Args:
        recipe: the recipe.
        splits: its data.
        encoder: of its checkpoint.
        limit: most rows of a stage to encode.

    Raises:
        DataError: none of a stage's rows can be used.
    """
    found = []
    if recipe.stage1.enabled:
        found.append(_of_stage("stage1", recipe, splits.stage1, encoder, limit))
    if recipe.stage2.enabled:
        found.append(_of_stage("stage2", recipe, splits.stage2, encoder, limit))
    return found


def _of_stage(
    name: StageName, recipe: Recipe, examples: Sequence[Example], encoder: Encoder, limit: int
) -> StageRows:
    settings = recipe.stage1 if name == "stage1" else recipe.stage2
    sampled = random.Random(recipe.seed).sample(list(examples), min(limit, len(examples)))
    objective = settings.build()
    in_rounds = name == "stage2" and recipe.negatives.on_policy_fraction is not None
    if in_rounds:
        encoded, problems = encoder.encode_all(sampled, "none", require_negative=False)
        count = (recipe.negatives.per_prompt or 1) if objective.uses_negatives else 0
        encoded = [_with_stand_ins(row, count) for row in encoded]
    else:
        negatives = negatives_of(name, objective)
        encoded, problems = encoder.encode_all(sampled, negatives, require_negative=objective.needs_negatives)
    if not encoded:
        shown = "\n  ".join(problems[:5]) or "the data has no row for this stage"
        raise DataError(f"{name}: none of {len(sampled)} sampled rows can be used; the first:\n  {shown}")
    return StageRows(name, encoded, round(len(examples) * len(encoded) / len(sampled)), in_rounds)


def _with_stand_ins(row: EncodedExample, count: int) -> EncodedExample:
    """The row with negatives of chosen's length in place of the samples of a policy, which do not exist yet."""
    return replace(row, negatives=(row.chosen,) * count)


def seconds_per_prompt(stages: Sequence[StageRows]) -> float | None:
    """Measured seconds on this machine to decode and process the images of a prompt; ``None`` if no row has any.

    Raises:
        DataError: an image cannot be decoded.
    """
    prompts = [row.prompt for stage in stages for row in stage.sample if row.prompt.image_digest]
    if not prompts:
        return None
    timed = prompts[:: max(1, len(prompts) // TIMED)][:TIMED]
    _ = timed[0].images  # the first call loads code
    begin = time.perf_counter()
    for prompt in timed:
        _ = prompt.images
    return (time.perf_counter() - begin) / len(timed)
