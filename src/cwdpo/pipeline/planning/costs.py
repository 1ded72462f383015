"""What a hollow model of a recipe takes: memory at its peak, operations, and settings that would need less memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode.collate import PromptBatch
from cwdpo.errors import ModelError
from cwdpo.models.hollow import hollow_model
from cwdpo.models.load_sharded import why_not_sharded
from cwdpo.models.memory import Memory
from cwdpo.models.sharding import gathered_in_step, most_gathered
from cwdpo.models.shared_attention import shares_prefix
from cwdpo.models.vision_cache import keep_vision_features
from cwdpo.objectives.base import Objective
from cwdpo.pipeline.planning.rows import StageRows
from cwdpo.scoring.score import row_tokens
from cwdpo.trainer.batching import row_lengths
from cwdpo.trainer.dry_step import OF_THE_BATCH, DryRun, HowToStep, StepCost


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one GPU when a micro-batch takes most.

    Attributes:
        parts: by part; their sum is ``total``.
        prompts, tokens: size of that micro-batch, tokens with padding.
    """

    parts: Mapping[str, int]
    prompts: int
    tokens: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    def share_that_fits(self, usable: int) -> float:
        """The share of the micro-batch that would fit, if what it takes is proportional to its size."""
        moving = sum(size for name, size in self.parts.items() if name in OF_THE_BATCH)
        return max(0.0, (usable - self.total + moving) / max(moving, 1))


class HollowRun:
    """A recipe's model without numbers; built when it is first needed, and again if its settings change.

    Args:
        config: transformers' configuration of the checkpoint.
        gpus: number of GPUs that the run is on, each with the whole model.
        sharded: under FSDP2, which spreads weights, optimizer state and gradients over the GPUs, and gathers those of a
            layer when it runs (:func:`cwdpo.models.sharding.most_gathered`). Models that are loaded whole before they
            are sharded count whole (:func:`cwdpo.models.load_sharded.why_not_sharded`).
    """

    def __init__(self, config: Any, gpus: int, *, sharded: bool = False) -> None:
        self.config, self.gpus, self.sharded = config, gpus, sharded
        self._built: tuple[Any, tuple[DryRun, Memory]] | None = None

    def _of(self, recipe: Recipe) -> tuple[DryRun, Memory]:
        """The model that the recipe trains, and what it keeps on its device."""
        key = recipe.model, recipe.train.optimizer
        if self._built is None or self._built[0] != key:
            if recipe.model.quantization is not None and recipe.model.lora.use_dora:
                raise ModelError(
                    "model.lora.use_dora: DoRA on quantized weights cannot be planned: leave out one"
                )
            model, memory = hollow_model(deepcopy(self.config), recipe.model, recipe.train.optimizer)
            with _quiet():
                keep_vision_features(model, recipe.model.vision_cache_gb)
            self._built = key, (DryRun(model), memory)
        return self._built[1]

    def shared(self, recipe: Recipe) -> bool:
        """Whether the recipe's model is scored in shared-prefix rows."""
        return shares_prefix(self._of(recipe)[0].model)

    def kept(self, recipe: Recipe) -> int:
        """Bytes that lie in a GPU's memory before any batch: weights, adapters, optimizer state, gradients."""
        memory = self._of(recipe)[1]
        if not self.sharded:
            return memory.total
        moving = memory.optimizer + memory.gradients
        weights = sum(self._weights(recipe).values())
        return memory.total - memory.weights + weights - moving + moving // self.gpus

    def _weights(self, recipe: Recipe) -> dict[str, int]:
        """Bytes of the base's weights in a floating dtype, by part."""
        dry, memory = self._of(recipe)
        if not self.sharded or why_not_sharded(recipe.model) is not None:
            return {"weights": memory.weights}
        gathered = most_gathered(dry.model, trained=recipe.model.tune == "full")
        return {"weights": memory.weights // self.gpus, "gathered layers": gathered}

    def communication(self, recipe: Recipe) -> int:
        """Bytes that a GPU sends to the others in an optimizer step, at most.

        Rings of N GPUs: gathering or reducing b bytes sends b (N - 1) / N, and an all-reduce does both. Under FSDP2 the
        weights are gathered for every micro-batch, in their own dtype; gradients are reduced once a step.
        """
        dry, memory = self._of(recipe)
        if not self.sharded:
            sent = 2 * memory.gradients
        else:
            times = recipe.train.gradient_accumulation_steps
            sent = times * gathered_in_step(dry.model) + memory.gradients
        return sent * (self.gpus - 1) // self.gpus

    def step(self, recipe: Recipe, objective: Objective, batch: PromptBatch) -> StepCost:
        """The cost of a micro-batch; features of a frozen vision side are computed for it."""
        train = recipe.train
        how = HowToStep(
            train.bf16,
            train.gradient_checkpointing,
            train.gradient_accumulation_steps > 1,
            objective.token_stats,
            self.gpus if self.sharded else 1,
        )
        return self._of(recipe)[0].step(batch, how)

    def peak(self, recipe: Recipe, stages: Sequence[StageRows]) -> PeakMemory:
        """The memory of the micro-batch with most tokens, over all stages."""
        shared = self.shared(recipe)
        largest = {stage.name: stage.batches(recipe.train, shared=shared)[-1] for stage in stages}
        name, batch = max(largest.items(), key=lambda item: row_tokens(item[1], shared=shared)[1])
        settings = recipe.stage1 if name == "stage1" else recipe.stage2
        cost, memory = self.step(recipe, settings.build(), batch), self._of(recipe)[1]
        parts = {
            **self._weights(recipe),
            "quantized weights": memory.quantized,
            "adapters": memory.adapters,
            "optimizer state": memory.optimizer // (self.gpus if self.sharded else 1),
            "gradient buckets": memory.gradients if self.gpus > 1 and not self.sharded else 0,
            **cost.parts,
        }
        return PeakMemory(
            {k: v for k, v in parts.items() if v}, len(batch.example_ids), row_tokens(batch, shared=shared)[1]
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of a run, which would be repeated for every setting that is tried."""
    logger = logging.getLogger("cwdpo")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclass(frozen=True)
class Remedy:
    """Settings that need less memory, each in addition to those tried before.

    Attributes:
        settings: ``section.key=value``.
        memory: the peak with them.
        fits: whether it fits.
    """

    settings: tuple[str, ...]
    memory: PeakMemory
    fits: bool


def remedies(
    run: HollowRun, recipe: Recipe, stages: Sequence[StageRows], usable: int
) -> tuple[list[Remedy], Recipe]:
    """Settings that would make the run fit, tried one after the other until it does.

    First activation checkpointing, then smaller micro-batches with more accumulation, then LoRA on a base in 4 bits.

    Args:
        run: the recipe's model.
        recipe: the recipe, which does not fit.
        stages: its rows.
        usable: bytes of a GPU that may be filled.

    Returns:
        What was tried, and the recipe with all of it.
    """
    tried: list[Remedy] = []
    said: dict[str, str] = {}

    def attempt(found: Recipe, settings: Mapping[str, str]) -> bool:
        nonlocal recipe
        recipe = found
        said.update(settings)
        memory = run.peak(recipe, stages)
        tried.append(Remedy(tuple(f"{k}={v}" for k, v in said.items()), memory, memory.total <= usable))
        return tried[-1].fits

    if not recipe.train.gradient_checkpointing and attempt(
        _with(recipe, "train", gradient_checkpointing=True), {"train.gradient_checkpointing": "true"}
    ):
        return tried, recipe
    before = tried[-1].memory if tried else run.peak(recipe, stages)
    while (
        smaller := _smaller_batch(recipe, stages, run.shared(recipe), before.share_that_fits(usable))
    ) is not None:
        if attempt(*smaller):
            return tried, recipe
        before = tried[-1].memory
    if recipe.model.quantization != "nf4" and not run.sharded:  # FSDP2 does not shard weights in 4 bits
        settings = {"model.tune": "lora"} if recipe.model.tune == "full" else {}
        quantized = _with(recipe, "model", tune="lora", quantization="nf4")
        if recipe.train.optimizer != "adamw":
            settings["train.optimizer"], quantized = "adamw", _with(quantized, "train", optimizer="adamw")
        attempt(quantized, {**settings, "model.quantization": "nf4"})
    return tried, recipe


def _smaller_batch(
    recipe: Recipe, stages: Sequence[StageRows], shared: bool, share: float
) -> tuple[Recipe, dict[str, str]] | None:
    """The recipe with smaller micro-batches and as many prompts in a step; ``None`` if that is impossible.

    Args:
        share: of the present size that is expected to fit.
    """
    train = recipe.train
    if train.max_tokens_per_batch is not None:
        longest = max(r * n for s in stages for r, n in (row_lengths(row, shared=shared) for row in s.sample))
        size = max(longest, int(train.max_tokens_per_batch * min(share, 0.5)))
        if size > train.max_tokens_per_batch // 2:
            return None
        times = math.ceil(train.max_tokens_per_batch / size)
        smaller = {"max_tokens_per_batch": size}
    elif train.batch_size == 1:
        return None
    else:
        divisors = [n for n in range(1, train.batch_size) if train.batch_size % n == 0]
        size = max([n for n in divisors if n <= train.batch_size * share], default=1)
        times, smaller = train.batch_size // size, {"batch_size": size}
    smaller["gradient_accumulation_steps"] = train.gradient_accumulation_steps * times
    return _with(recipe, "train", **smaller), {f"train.{k}": str(v) for k, v in smaller.items()}


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
