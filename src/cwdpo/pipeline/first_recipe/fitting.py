"""Which way of training fits a GPU: tried from the best to the cheapest, each by the step of a hollow model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cwdpo.config import Recipe
from cwdpo.errors import RecipeError
from cwdpo.pipeline.planning.costs import HollowRun, PeakMemory
from cwdpo.pipeline.planning.gpus import in_units
from cwdpo.pipeline.planning.rows import StageRows
from cwdpo.pipeline.planning.run import Hardware

MARGIN = 0.95
"""Share of the memory that a plan may fill: the longest row of the data may not be among those that were encoded."""
MOST_AT_ONCE = 8
"""Prompts of the largest micro-batch that is tried: a larger one hardly trains faster."""

Tune = Literal["lora", "full"]


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        name: for the user.
        model, train: settings of the recipe's sections.
        sharded: under FSDP2.
    """

    name: str
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    sharded: bool = False

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with these settings."""
        return recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update=dict(self.model)),
                "train": recipe.train.model_copy(update=dict(self.train)),
            }
        )


@dataclass(frozen=True)
class Tried:
    """A way and what it takes.

    Attributes:
        way: the way.
        prompts: of the micro-batch; 0: only what lies in memory before any batch was counted, which is too much.
        size: bytes of a GPU at its peak.
        fits: whether that is within the margin.
    """

    way: Way
    prompts: int
    size: int
    fits: bool

    def said(self) -> str:
        """For the user."""
        size = in_units(self.size)
        if not self.prompts:
            return f"{self.way.name}: {size} before any batch"
        return f"{self.way.name}: {size} with {self.prompts} prompt{'s' * (self.prompts > 1)} at a time"


@dataclass(frozen=True)
class Fitted:
    """What was found: the recipe, the way that fits, and all that was tried; the last of them fits."""

    recipe: Recipe
    way: Way
    memory: PeakMemory
    tried: tuple[Tried, ...] = field(default=())


def ways(tune: Tune, gpus: int, *, bf16: bool = True) -> Iterator[Way]:
    """Ways of training, the best first.

    Args:
        tune: what is trained, if that fits.
        gpus: number of GPUs.
        bf16: whether they have bfloat16 units; without, everything is in float32.
    """
    recomputed = {"gradient_checkpointing": True}
    name, dtype = ("bf16", "bfloat16") if bf16 else ("float32", "float32")
    if tune == "full":
        whole, said = {"tune": "full", "dtype": dtype}, f"all weights in {name}"
        kahan = {"optimizer": "adamw_kahan"} if bf16 else {}
        yield Way(said, whole, kahan)
        yield Way(f"{said}, activations recomputed", whole, {**kahan, **recomputed})
        if gpus > 1:
            yield Way(f"{said}, FSDP2", whole, kahan, True)
            yield Way(f"{said}, activations recomputed, FSDP2", whole, {**kahan, **recomputed}, True)
    base, computed = {"tune": "lora", "dtype": dtype}, {"bf16": True} if bf16 else {}
    yield Way(f"LoRA on {name} weights", base, computed)
    yield Way(f"LoRA on {name} weights, activations recomputed", base, {**computed, **recomputed})
    quantized = {**base, "quantization": "nf4"}
    yield Way("LoRA on weights in 4 bits, activations recomputed", quantized, {**computed, **recomputed})


def _of_quantized(*, bf16: bool) -> Iterator[Way]:
    """Ways for a checkpoint whose weights lie in 4 or 8 bits: LoRA on them as they are."""
    computed = {"bf16": True} if bf16 else {}
    yield Way("LoRA on the checkpoint's quantized weights", {"tune": "lora"}, computed)
    yield Way(
        "LoRA on the checkpoint's quantized weights, activations recomputed",
        {"tune": "lora"},
        {**computed, "gradient_checkpointing": True},
    )


def fitted(
    config: Any, recipe: Recipe, stages: Sequence[StageRows], hardware: Hardware, tune: Tune
) -> Fitted:
    """The first way that fits, with the largest micro-batches that fit.

    Args:
        config: transformers' configuration of the model.
        recipe: with ``train.batch_size`` prompts of a step on each GPU.
        stages: encoded rows.
        hardware: the GPUs.
        tune: what to try first.

    Raises:
        RecipeError: nothing fits; the message says what was tried and what to do.
    """
    limit, tried = int(MARGIN * hardware.gpu.usable), list[Tried]()
    runs = {sharded: HollowRun(config, hardware.gpus, sharded=sharded) for sharded in (False, True)}
    bf16 = hardware.gpu.bf16
    lies_quantized = recipe.model.quantization is not None
    for way in _of_quantized(bf16=bf16) if lies_quantized else ways(tune, hardware.gpus, bf16=bf16):
        found = _largest(runs[way.sharded], way, way.applied(recipe), stages, limit, tried)
        if found is not None:
            return Fitted(*found, tuple(tried))
    raise RecipeError(
        f"nothing fits {hardware.gpu.name}: of {hardware.gpu.memory_gib:g} GiB, {in_units(limit)} may be filled\n"
        + "\n".join(f"  {one.said()}" for one in tried)
        + "\ntake a GPU with more memory or a smaller model, or make rows shorter (smaller images, shorter responses)"
    )


def _largest(
    run: HollowRun, way: Way, recipe: Recipe, stages: Sequence[StageRows], limit: int, tried: list[Tried]
) -> tuple[Recipe, Way, PeakMemory] | None:
    """The recipe with the largest micro-batches that fit; ``None`` if one prompt is too much."""
    kept = run.kept(recipe)
    if kept > limit:
        if not any((one.way.model, one.way.sharded) == (way.model, way.sharded) for one in tried):
            tried.append(Tried(way, 0, kept, False))
        return None
    whole = recipe.train.batch_size
    size = max(n for n in _divisors(whole) if n <= MOST_AT_ONCE)
    while True:
        now = recipe.model_copy(
            update={
                "train": recipe.train.model_copy(
                    update={"batch_size": size, "gradient_accumulation_steps": whole // size}
                )
            }
        )
        memory = run.peak(now, stages)
        if memory.total <= limit:
            tried.append(Tried(way, size, memory.total, True))
            return now, way, memory
        if size == 1:
            tried.append(Tried(way, size, memory.total, False))
            return None
        share = memory.share_that_fits(limit)
        size = max((n for n in _divisors(size)[:-1] if n <= size * share), default=1)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
