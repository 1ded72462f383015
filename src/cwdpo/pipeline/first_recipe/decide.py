"""What goes into a first recipe, and why; the reasons are those of docs/choosing.md, or the numbers of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.pipeline.first_recipe.fitting import MARGIN, Fitted
from cwdpo.pipeline.first_recipe.rows import Rows
from cwdpo.pipeline.first_recipe.text import Decision
from cwdpo.pipeline.planning.gpus import in_units
from cwdpo.pipeline.planning.run import Hardware

PROMPTS = 16
"""Prompts of an optimizer step, if there are rows enough."""
IMAGE_TOKENS = 640
"""Most tokens of an image, where the processor asks for a number of pixels."""
FEW = 100
"""Rows below which a fifth is held out, not a tenth."""
LEAST_STEPS, MOST_EPOCHS = 30, 3
RATES = {"lora": (2e-5, 1e-5), "full": (2e-6, 1e-6)}
"""Learning rates of the stages, by what is trained: a place to start."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        name: of the run.
        model, data: folder or hub id; path or hub id.
        objective: of stage 2; ``None``: by the rows.
    """

    name: str
    model: str
    data: str
    objective: str | None = None


def held_out(rows: Rows) -> float:
    """The share of the images for validation; none if a held-out set lies beside the data."""
    if rows.validation is not None:
        return 0.0
    return 0.2 if rows.rows < FEW else 0.1


def held_rows(rows: Rows) -> int:
    """Roughly the rows for validation."""
    return max(1, round(rows.rows * held_out(rows))) if rows.validation is None else rows.validation[1]


def stage_rows_of(rows: Rows) -> tuple[int, int]:
    """Roughly the rows of the two stages: three quarters and a quarter of those that are trained on."""
    trained = rows.rows * (1 - held_out(rows))
    return max(1, round(trained * 0.75)), max(1, round(trained * 0.25))


def prompts_of_a_step(rows: Rows, gpus: int) -> int:
    """Prompts of an optimizer step on each GPU: together 16, or a power of two that leaves stage 2 eight steps."""
    eighth = max(1, stage_rows_of(rows)[1] // 8)
    wanted = min(PROMPTS, 1 << (eighth.bit_length() - 1))
    return max(1, wanted // gpus)


def image_limit(processor: Any) -> dict[str, Any] | None:
    """``processor_options`` that limit an image to 640 tokens, where the processor counts pixels as Qwen-VL's do."""
    images = getattr(processor, "image_processor", None)
    size = getattr(images, "size", None) or {}
    longest, least = size.get("longest_edge"), size.get("shortest_edge")
    merged, patch = getattr(images, "merge_size", None), getattr(images, "patch_size", None)
    if not (longest and least and isinstance(merged, int) and isinstance(patch, int)):
        return None
    most = IMAGE_TOKENS * (merged * patch) ** 2
    return {"size": {"shortest_edge": least, "longest_edge": most}} if longest > most >= least else None


def lengths(rows: Sequence[EncodedExample]) -> tuple[int, int]:
    """``data.max_length``, a tenth above the longest row, and the new tokens that 95% of the chosen responses take."""
    longest = max(max(row.row_tokens(shared=False)) for row in rows)
    chosen = sorted(len(row.chosen.ids) for row in rows)
    usual = chosen[min(len(chosen) - 1, int(0.95 * len(chosen)))]
    return 64 * math.ceil(1.1 * longest / 64), min(256, 16 * math.ceil(usual / 16))


def before_fitting(asked: Asked, rows: Rows, options: Mapping[str, Any] | None, gpus: int) -> list[Decision]:
    """What does not depend on the GPU's memory."""
    found = [
        Decision("name", asked.name),
        Decision("model.path", asked.model),
        Decision(
            "model.freeze",
            ["vision"],
            "The vision tower stays as it is: no adapters in it, and its features are kept for the next epoch.",
        ),
    ]
    if options is not None:
        why = f"Pixels of an image: at most {IMAGE_TOKENS} tokens. Raise it if small print matters."
        found.append(Decision("model.processor_options", dict(options), why))
    held = held_rows(rows)
    if rows.validation is not None:
        why = f"It lies beside the data, {held} rows: for probes and evaluation."
        validation = Decision("data.validation_path", rows.validation[0], why)
    else:
        why = f"By image, about {held} rows: for probes and evaluation."
        validation = Decision("data.validation_fraction", held_out(rows), why)
    return [*found, Decision("data.path", asked.data, _said_of(rows)), validation, *_stage2(asked, rows)]


def _said_of(rows: Rows) -> str:
    seen = "all" if rows.whole else f"the first {rows.read}"
    about = "" if rows.whole else "about "
    bad = f" {rows.bad} of them bad: see cwdpo validate." if rows.bad else ""
    return f"Format {rows.format}, {about}{rows.rows} usable rows ({seen} were read).{bad}"


def _stage2(asked: Asked, rows: Rows) -> list[Decision]:
    """Objective and negatives of stage 2, by docs/choosing.md."""
    alike = f"Rejected shares {rows.alike:.0%} of its words with chosen"
    if asked.objective is not None:
        own: dict[str, Any] = {"name": asked.objective}
        if asked.objective in ("cw_dpo", "dpo"):
            own["beta"] = 0.1
        return [Decision("stage2.objective", own, "Asked for.")]
    cooled: dict[str, Any] = {"name": "cw_dpo", "beta": 0.1, "floor": "auto", "tau": "auto"}
    if rows.rejected == "edits":
        why = (
            f"{alike}: edits of it. There cw_dpo and dpo with sft_weight are hard to break, and neither is better; the "
            "mask leaves the tokens that both share out of the negative's loss (docs/choosing.md)."
        )
        return [Decision("stage2.objective", {**cooled, "negative_mask": "differing_span"}, why)]
    if rows.rejected == "others":
        why = (
            f"{alike}: responses of their own, of which chosen is the better one. There cw_dpo wrote more right "
            "captions at temperature 1 than ten contrastive objectives, and as many as dpo with sft_weight "
            "(docs/choosing.md)."
        )
        return [Decision("stage2.objective", cooled, why)]
    why = "There are no rejected responses: SFT first, then samples of the model as negatives (docs/choosing.md)."
    return [
        Decision("negatives.on_policy_fraction", 1.0, why),
        Decision("stage2.objective", cooled, "floor and tau: from samples of the model itself."),
    ]


def after_fitting(rows: Rows, hardware: Hardware, found: Fitted, sizes: tuple[int, int]) -> list[Decision]:
    """What depends on the GPU, on the way that fits, and on the lengths of the rows.

    Args:
        rows: what was found in the data.
        hardware: the GPUs.
        found: the way that fits.
        sizes: see :func:`lengths`.
    """
    max_length, new_tokens = sizes
    train, gpus = found.recipe.train, hardware.gpus
    step = train.batch_size * train.gradient_accumulation_steps * gpus
    held = held_rows(rows)
    at_once = train.batch_size if train.gradient_checkpointing else 4 * train.batch_size
    stage1, epochs1 = _length(stage_rows_of(rows)[0], step)
    stage2, epochs2 = _length(stage_rows_of(rows)[1], step)
    rates = RATES[found.recipe.model.tune]
    rate = "A place to start, not a result: then try four times this rate (docs/choosing.md)."
    made = [
        *_of_the_model(hardware, found),
        Decision(
            "data.max_length",
            max_length,
            "A tenth above the longest row that was encoded; longer ones are left out.",
        ),
        Decision(
            "stage1.objective",
            "sft",
            "Plain SFT on chosen, on other images than stage 2's (data.stage1_fraction: 0.75). Gentle negatives gained "
            "little (docs/choosing.md).",
        ),
        Decision("stage1.learning_rate", rates[0]),
        Decision("stage1.epochs", epochs1, f"About {stage1} steps of {_prompts(step)}."),
        Decision("stage2.learning_rate", rates[1], rate),
        Decision("stage2.epochs", epochs2, f"About {stage2} steps of {_prompts(step)}."),
        *_of_the_step(hardware, found),
        Decision("train.warmup_steps", 0.1, "A tenth of the steps."),
        Decision("train.logging_steps", max(1, min(10, stage2 // 10))),
        Decision(
            "train.save_steps", max(5, min(200, max(stage1, stage2) // 5)), "What a kill costs at most."
        ),
        Decision("calibration.max_new_tokens", new_tokens, "95% of the chosen responses are as short."),
        Decision(
            "probes.every", max(1, min(25, stage2 // 4)), "Steps between two looks at held-out prompts."
        ),
        Decision("probes.prompts", min(64, held)),
        Decision("evaluation.prompts", min(64, held), "Responses to held-out prompts at the end."),
        Decision("evaluation.max_new_tokens", new_tokens),
        Decision(
            "evaluation.batch_size",
            min(32, at_once),
            "Prompts of a pass without gradient, which keeps no activations; a plan does not count it.",
        ),
        Decision("stop", [], "The default limits come from the embedded world, not from your model."),
    ]
    if rows.rejected == "none":
        sampled = {"samples": 4, "batch_size": max(1, at_once // 4), "max_new_tokens": new_tokens}
        made.append(Decision("negatives.sampler", sampled))
    return made


def _prompts(n: int) -> str:
    return f"{n} prompt{'s' * (n > 1)}"


def _length(rows: int, step: int) -> tuple[int, int]:
    """Steps and epochs of a stage."""
    of_an_epoch = math.ceil(rows / step)
    epochs = max(1, min(MOST_EPOCHS, math.ceil(LEAST_STEPS / of_an_epoch)))
    return of_an_epoch * epochs, epochs


def _of_the_model(hardware: Hardware, found: Fitted) -> list[Decision]:
    """What is trained, and on which weights."""
    model, way = found.recipe.model, found.way
    room = f"{hardware.gpu.memory_gib:g} GiB of {hardware.gpu.name}"
    taken = (
        f"{in_units(found.memory.total)} of the {room}"
        + (f", on each of {hardware.gpus}" if hardware.gpus > 1 else "")
        + f", by cwdpo plan (at most {in_units(MARGIN * hardware.gpu.usable)} are filled)."
    )
    best: dict[str, str] = {}  # of what was tried in vain, the cheapest way of each kind
    for one in found.tried[:-1]:
        best[one.way.name.partition(",")[0]] = one.said()
    mine = way.name.partition(",")[0]
    others = "; ".join(said for name, said in best.items() if name != mine)
    why = f"{way.name}: {taken}" + (f" Too much would be: {others}." if others else "")
    made = [Decision("model.tune", model.tune, why)]
    if "dtype" in way.model:
        slow = f"{hardware.gpu.name} has no bfloat16 units; in float32 it is faster."
        made.append(Decision("model.dtype", model.dtype, "" if hardware.gpu.bf16 else slow))
    if "quantization" in way.model:
        made.append(
            Decision(
                "model.quantization", model.quantization, "Needs bitsandbytes: pip install 'cwdpo[quant]'."
            )
        )
    return made


def _of_the_step(hardware: Hardware, found: Fitted) -> list[Decision]:
    """How a step is cut and computed."""
    train, way = found.recipe.train, found.way
    cut = f"{train.batch_size} x {train.gradient_accumulation_steps}"
    spread = f" x {hardware.gpus} GPUs" if hardware.gpus > 1 else ""
    prompts = train.batch_size * train.gradient_accumulation_steps * hardware.gpus
    made = [
        Decision(
            "train.batch_size",
            train.batch_size,
            f"Micro-batches that fit: {cut}{spread} = {_prompts(prompts)} in a step.",
        ),
        Decision("train.gradient_accumulation_steps", train.gradient_accumulation_steps),
    ]
    if "bf16" in way.train:
        made.append(Decision("train.bf16", True))
    if "optimizer" in way.train:
        why = (
            "It keeps what bf16 rounds away from the updates. Needs torch-optimi: pip install 'cwdpo[bf16]'."
        )
        made.append(Decision("train.optimizer", train.optimizer, why))
    if train.gradient_checkpointing:
        without = [
            one
            for one in found.tried
            if one.prompts and one.way.model == way.model and one.way.sharded == way.sharded
            and "recomputed" not in one.way.name
        ]  # fmt: skip
        more = f" Without, {without[-1].said()}." if without else ""
        made.append(
            Decision(
                "train.gradient_checkpointing",
                True,
                f"Activations are computed again, a third more work.{more}",
            )
        )
    return made
