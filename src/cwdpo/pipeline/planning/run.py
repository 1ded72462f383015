"""``cwdpo plan``: memory, time and cost of a run, before anything is rented. No weights are needed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode.collate import PromptBatch
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.models.hollow import dtype_of
from cwdpo.models.load_sharded import why_not_sharded
from cwdpo.monitor.probe_set import EXTRA_PASSES, Load, within_budget
from cwdpo.pipeline.planning.costs import HollowRun, PeakMemory, Remedy, remedies
from cwdpo.pipeline.planning.gpus import Gpu
from cwdpo.pipeline.planning.reading import RunData, read_run
from cwdpo.pipeline.planning.rows import StageRows, seconds_per_prompt
from cwdpo.scoring.score import row_tokens
from cwdpo.trainer.dry_step import StepCost


@dataclass(frozen=True)
class Hardware:
    """What the run would be on.

    Attributes:
        gpu: the GPU.
        gpus: how many, each with the whole model (DDP).
        utilisation: share of the GPU's operations per second that training reaches.
        price: of one GPU for an hour, in any currency.
        sharded: whether FSDP2 spreads weights, gradients and optimizer state over them.
    """

    gpu: Gpu
    gpus: int = 1
    utilisation: float = 0.4
    price: float | None = None
    sharded: bool = False

    def seconds(self, flops: float) -> float:
        """Time for operations that all GPUs share."""
        return flops / (self.gpu.tflops * 1e12 * self.utilisation * self.gpus)


@dataclass(frozen=True)
class StagePlan:
    """One stage; operations are floating-point operations of all GPUs.

    Attributes:
        name, objective: the stage and its objective.
        rows: estimated number of rows that it trains on.
        steps: optimizer steps.
        prompts_per_step, tokens_per_step: with padding, over all GPUs.
        plain_tokens_per_step: the same with one full sequence per completion.
        forward, backward: operations of a step; ``backward`` has the layers that checkpointing computes again.
        vision: operations of a step in a frozen vision side, without those saved by the cache of its features.
        ahead: operations of the additional forward pass of an objective that looks ahead.
        reference: operations of the reference pass before step 1.
        probes: operations of all held-out measurements, roughly.
    """

    name: str
    objective: str
    rows: int
    steps: int
    prompts_per_step: float
    tokens_per_step: float
    plain_tokens_per_step: float
    forward: float
    backward: float
    vision: float
    ahead: float
    reference: float
    probes: float

    @property
    def step(self) -> float:
        """Operations of a step."""
        return self.forward + self.backward + self.vision + self.ahead

    @property
    def total(self) -> float:
        """Operations of the stage."""
        return self.step * self.steps + self.reference + self.probes


@dataclass(frozen=True)
class Images:
    """Reading images, measured on this machine.

    Attributes:
        seconds: to decode and process the images of a prompt, on one core.
        workers: cores per GPU that do this as fast as the GPU trains.
        cached: estimated share of pictures whose features are in ``model.vision_cache_gb``, so that they are not read.
    """

    seconds: float
    workers: float
    cached: float


@dataclass(frozen=True)
class Plan:
    """The plan of a run; ``communication``: bytes that a GPU sends in an optimizer step, at most."""

    hardware: Hardware
    source: str
    tune: str
    dtype: str
    quantization: str | None
    shared: bool
    sampled: int
    memory: PeakMemory
    fits: bool
    remedies: tuple[Remedy, ...]
    stages: tuple[StagePlan, ...]
    images: Images | None
    communication: int
    notes: tuple[str, ...]

    @property
    def seconds_to_send(self) -> float | None:
        """Seconds of a step that sending takes, if it does not overlap with anything."""
        link = self.hardware.gpu.link
        return None if link is None else self.communication / (link * 1e9)

    @property
    def possible(self) -> bool:
        """Whether the run fits as it is, or with settings that were tried."""
        return self.fits or any(remedy.fits for remedy in self.remedies)

    @property
    def hours(self) -> float:
        """Hours of the run."""
        return sum(self.hardware.seconds(stage.total) for stage in self.stages) / 3600

    @property
    def cost(self) -> float | None:
        """Price of the run."""
        price = self.hardware.price
        return None if price is None else price * self.hours * self.hardware.gpus

    def to_json(self) -> dict[str, Any]:
        """All numbers: bytes, operations, seconds, hours."""
        shown = asdict(self)
        shown["hardware"]["usable_bytes"] = self.hardware.gpu.usable
        for own, memory in (
            (shown["memory"], self.memory),
            *((r["memory"], m.memory) for r, m in zip(shown["remedies"], self.remedies, strict=True)),
        ):
            own["total"] = memory.total
        for own, stage in zip(shown["stages"], self.stages, strict=True):
            seconds = self.hardware.seconds
            own |= {"step": stage.step, "total": stage.total, "seconds_of_a_step": seconds(stage.step)}
            own["hours"] = seconds(stage.total) / 3600
        return {**shown, "hours": self.hours, "cost": self.cost, "seconds_to_send": self.seconds_to_send}


def plan_run(recipe: Recipe, hardware: Hardware, rows: int = 256) -> Plan:
    """Plan the run of a recipe.

    The recipe's data are read as a run reads them, and ``rows`` of each stage are encoded. Then the code of a training
    step runs on a model without numbers (:mod:`cwdpo.trainer.dry_step`). If the run does not fit, further settings are
    tried, and steps and time are those with these settings.

    Args:
        recipe: the recipe; of ``model.path`` only configurations, tokenizer and processor are read.
        hardware: what the run would be on.
        rows: most rows of a stage to encode.

    Raises:
        CwdpoError: recipe, data or model are bad.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, config, data = read_run(recipe, rows, Path(folder))
        return _planned(recipe, hardware, config, data)


def _planned(asked: Recipe, hardware: Hardware, config: Any, data: RunData) -> Plan:
    hollow = HollowRun(config, hardware.gpus, sharded=hardware.sharded)
    memory = hollow.peak(asked, data.stages)
    fits = memory.total <= hardware.gpu.usable
    tried, recipe = ([], asked) if fits else remedies(hollow, asked, data.stages, hardware.gpu.usable)
    seconds = seconds_per_prompt(data.stages)
    held = data.encoder.encode_all(
        data.splits.validation[: recipe.probes.prompts], "rejected", require_negative=False
    )[0]
    found = [_stage_plan(stage, recipe, hardware, hollow, (data.pictures, held)) for stage in data.stages]
    stages = tuple(stage for stage, _ in found)
    images = None if seconds is None else _images(seconds, found, hardware)
    model = asked.model
    return Plan(
        hardware, model.path, model.tune, dtype_of(config, model), model.quantization, hollow.shared(recipe),
        sum(len(stage.sample) for stage in data.stages), memory, fits, tuple(tried), stages, images,
        hollow.communication(recipe), _notes(recipe, hardware),
    )  # fmt: skip


def _stage_plan(
    stage: StageRows,
    recipe: Recipe,
    hardware: Hardware,
    hollow: HollowRun,
    run: tuple[int, Sequence[EncodedExample]],
) -> tuple[StagePlan, float]:
    """The plan of a stage, and the share of its prompts whose image features are cached.

    Args:
        run: number of different pictures of the run, and encoded held-out prompts.
    """
    train, shared = recipe.train, hollow.shared(recipe)
    settings = recipe.stage1 if stage.name == "stage1" else recipe.stage2
    objective = settings.build()
    batches = stage.batches(train, shared=shared)
    typical = batches[len(batches) // 2]
    cost = hollow.step(recipe, objective, typical)
    micro_batches = train.gradient_accumulation_steps * hardware.gpus
    rows, tokens, plain = (
        micro_batches * sum(sizes) / len(batches)
        for sizes in (
            [len(batch.example_ids) for batch in batches],
            [row_tokens(batch, shared=shared)[1] for batch in batches],
            [row_tokens(batch, shared=False)[1] for batch in batches],
        )
    )
    # Operations of a step: those of the typical micro-batch, in proportion to its tokens.
    scale = tokens / row_tokens(typical, shared=shared)[1]
    pictures, held = run
    steps = stage.steps(recipe, hardware.gpus, batches)
    cached = _cached_share(recipe, typical, cost, pictures)
    if not objective.needs_reference:  # then the first epoch fills the cache
        cached *= max(0.0, 1 - stage.rows / rows / steps)
    # In rounds, the negatives of each round are scored at its start.
    scored = steps * rows if stage.in_rounds else stage.rows
    probed = _probe_tokens(recipe, held, Load(tokens, steps, shared))
    plan = StagePlan(
        name=stage.name,
        objective=str(settings.objective["name"]),
        rows=stage.rows,
        steps=steps,
        prompts_per_step=rows,
        tokens_per_step=tokens,
        plain_tokens_per_step=plain,
        forward=cost.forward * scale,
        backward=cost.backward * scale,
        vision=cost.vision * scale * (1 - cached),
        ahead=cost.forward * scale if objective.looks_ahead and micro_batches > 1 else 0.0,
        reference=(cost.forward + cost.vision) * scale * scored / rows * objective.needs_reference,
        probes=cost.forward * scale * probed / tokens,
    )
    return plan, cached


def _cached_share(recipe: Recipe, batch: PromptBatch, cost: StepCost, pictures: int) -> float:
    """Share of a run's pictures whose features fit into ``model.vision_cache_gb``, if they take what the batch's do."""
    if not cost.cached:
        return 0.0
    size = cost.cached / len({prompt.image_digest for prompt in batch.prompts if prompt.image_digest})
    return min(1.0, recipe.model.vision_cache_gb * 2**30 / (size * max(pictures, 1)))


def _probe_tokens(recipe: Recipe, held: Sequence[EncodedExample], load: Load) -> float:
    """Tokens of all held-out measurements of a stage, by the budget that limits them."""
    if not held:
        return 0.0
    prompts, typed = within_budget(held, load, recipe.probes)
    tokens = sum(sum(row.row_tokens(shared=load.shared)) for row in held[:prompts])
    for row in held[:typed]:
        prompt = 0 if load.shared else len(row.prompt.input_ids)
        tokens += len(recipe.probes.types) * (prompt + len(row.chosen.ids))
    return tokens * (load.steps / recipe.probes.every + EXTRA_PASSES)


def _images(seconds: float, stages: Sequence[tuple[StagePlan, float]], hardware: Hardware) -> Images:
    """The cores that reading images takes, in the stage that needs most."""
    needed = [
        (
            stage.prompts_per_step / hardware.gpus * (1 - cached) * seconds / hardware.seconds(stage.step),
            cached,
        )
        for stage, cached in stages
    ]
    return Images(seconds, *max(needed))


def _notes(recipe: Recipe, hardware: Hardware) -> tuple[str, ...]:
    """What the numbers leave out or assume."""
    notes = [
        "time is operations at the stated utilisation; loading, saving and waiting for images are left out"
    ]
    sampled = [f"evaluation of {recipe.evaluation.prompts} prompts"] if recipe.evaluation.prompts else []
    stages = [s for s in (recipe.stage1, recipe.stage2) if s.enabled]
    if any(stage.build().needs_calibration for stage in stages):
        sampled.append(f"calibration with at most {recipe.calibration.samples} samples")
    negatives = recipe.negatives
    if recipe.stage2.enabled and negatives.on_policy_fraction is not None:
        sampled.append(f"{negatives.sampler.samples} samples for each prompt of {negatives.rounds} rounds")
        notes.append("the policy's samples do not exist yet: each negative counts with the length of chosen")
    if sampled:
        notes.append(f"sampling is left out: {', '.join(sampled)}")
    halves = recipe.train.bf16 or recipe.model.dtype in ("bfloat16", "float16")
    if halves and not hardware.gpu.bf16:
        notes.append(
            f"{hardware.gpu.name} has no bfloat16 units: in float32 (model.dtype=float32 train.bf16=false) it is faster"
        )
    elif not halves and hardware.gpu.bf16:
        notes.append(
            "train.bf16 is false: where weights are float32, the GPU computes several times slower than assumed here"
        )
    if recipe.data.streaming is not None:
        notes.append("data.streaming: rows are those of the first window; reading is left out")
    if recipe.stage2.enabled and recipe.stop:
        notes.append("stop rules may end stage 2 earlier")
    if hardware.sharded and (reason := why_not_sharded(recipe.model)) is not None:
        notes.append(
            f"FSDP2: weights count whole, because with {reason} each GPU loads the whole model first"
        )
    elif hardware.sharded:
        notes.append("FSDP2: what is gathered at once is an upper bound")
    elif hardware.gpus > 1:
        notes.append("each GPU has the whole model (DDP); for FSDP2 give --fsdp; DeepSpeed is not planned")
    return tuple(notes)
