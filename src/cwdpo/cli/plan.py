"""``cwdpo plan``: memory, time and cost of a run before a GPU is rented."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from cwdpo.cli.common import TRAIN, AsJson, Overrides, Recipe
from cwdpo.pipeline.planning.gpus import in_units

if TYPE_CHECKING:
    from cwdpo.pipeline.planning.run import Hardware, Images, Plan, StagePlan

MOST_WORKERS = 64
"""Cores for each GPU that the output still names: no machine has more."""


def mount(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(rich_help_panel=TRAIN)(plan)


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="name of a GPU: h100, a100-80, l40s, 4090, ...; a wrong name lists all")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0, help="memory of a GPU, in GiB; default: of --gpu")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.1, help="10^12 dense bf16 operations per second; default: of --gpu"),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GB/s that a GPU sends to the others; default: that of --gpu in its usual servers"
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="number of GPUs, each with the whole model")] = 1,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="FSDP2: weights, gradients and optimizer state are spread over --gpus"),
    ] = False,
    price: Annotated[float | None, typer.Option(min=0, help="price of a GPU for an hour")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="share of --tflops that training reaches")
    ] = 0.4,
    rows: Annotated[int, typer.Option(min=1, help="rows of each stage to encode")] = 256,
    as_json: AsJson = False,
) -> None:
    """Show what a run would need: memory by part, whether it fits, time and cost; exit code 1 if nothing fits.

    Of the model only config.json, tokenizer and processor are needed. Nothing is trained or rented.
    """
    from cwdpo.config import load_recipe
    from cwdpo.pipeline.planning.gpus import gpu_of

    chosen = gpu_of(gpu, gpu_memory, tflops, link)
    parsed = load_recipe(recipe, overrides or ())
    from cwdpo.pipeline.planning.run import Hardware, plan_run

    found = plan_run(parsed, Hardware(chosen, gpus, utilisation, price, fsdp), rows)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(plan_lines(found)))
    if not found.possible:
        raise typer.Exit(1)


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan for a person."""
    hardware = plan.hardware
    chosen = hardware.gpu
    weights = plan.dtype if plan.quantization is None else f"{plan.quantization}, {plan.dtype}"
    rows = "shared-prefix rows" if plan.shared else "plain rows"
    yield f"model    {plan.source}: {plan.tune}, {weights}, {rows}"
    yield (
        f"GPU      {hardware.gpus} x {chosen.name}: {chosen.memory_gib:g} GiB, {chosen.tflops:g} TFLOP/s in "
        f"{chosen.dtype}, used to {hardware.utilisation:.0%}"
    )
    yield f"sample   {plan.sampled} rows"
    yield ""
    memory = plan.memory
    yield f"memory of a GPU, at the micro-batch of most tokens ({memory.prompts} prompts, {memory.tokens} tokens)"
    yield from _parts({**memory.parts, "together": memory.total, "usable": chosen.usable})
    yield f"  {'it fits' if plan.fits else 'it does not fit'}"
    for remedy in plan.remedies:
        verdict = "fits" if remedy.fits else "does not fit"
        yield f"  with {' '.join(remedy.settings)}: {in_units(remedy.memory.total)}, {verdict}"
    if plan.remedies:
        yield "  time and cost are those of the last line"
    yield ""
    for stage in plan.stages:
        yield from _stage(stage, hardware)
        yield ""
    if plan.images is not None:
        yield from _images(plan.images)
    if plan.communication:
        seconds = plan.seconds_to_send
        slow = (
            "" if seconds is None else f": {_time(seconds)} at {chosen.link:g} GB/s, where nothing overlaps"
        )
        yield f"sends    at most {in_units(plan.communication)} from each GPU in a step{slow}"
    yield f"run      {_time(plan.hours * 3600)}{_cost(plan)}"
    for note in plan.notes:
        yield f"note     {note}"


def _stage(stage: StagePlan, hardware: Hardware) -> Iterator[str]:
    yield (
        f"{stage.name}   {stage.objective}: {stage.rows} rows, {stage.steps} steps of {stage.prompts_per_step:.0f} "
        f"prompts, {_time(hardware.seconds(stage.total))}"
    )
    saved = stage.plain_tokens_per_step / stage.tokens_per_step
    plain = f"as plain rows {stage.plain_tokens_per_step:.0f} ({saved:.1f} x)"
    yield f"  tokens of a step   {stage.tokens_per_step:.0f}; {plain}"
    named = {
        "forward": stage.forward, "backward": stage.backward, "frozen vision": stage.vision, "look ahead": stage.ahead,
    }  # fmt: skip
    shown = ", ".join(f"{name} {_flops(n)}" for name, n in named.items() if n)
    yield f"  FLOPs of a step    {_flops(stage.step)} ({shown})"
    yield f"  time of a step     {_time(hardware.seconds(stage.step))}"
    shares = {"reference pass": stage.reference, "probes, roughly": stage.probes}
    said = ", ".join(f"{name} {value / stage.total:.1%}" for name, value in shares.items() if value)
    if said:
        yield f"  of the stage       {said}"


def _images(images: Images) -> Iterator[str]:
    cached = f"; features of {images.cached:.0%} of the pictures are cached" if images.cached else ""
    wanted = f"{images.workers:.1f} cores keep up with a GPU (train.dataloader_workers={math.ceil(images.workers)})"
    if images.workers > MOST_WORKERS:
        wanted = f"more than {MOST_WORKERS} cores would keep up with a GPU: it will wait for images"
    yield (
        f"images   {images.seconds * 1000:.0f} ms to decode and process those of a prompt on a core of this machine: "
        f"{wanted}{cached}"
    )


def _parts(parts: Mapping[str, int]) -> Iterator[str]:
    for name, size in parts.items():
        yield f"  {name:<18} {in_units(size):>10}"


def _cost(plan: Plan) -> str:
    if plan.cost is None:
        return ""
    return f", {plan.hardware.gpus * plan.hours:.2f} GPU-hours, costs {plan.cost:.2f}"


def _flops(count: float) -> str:
    power = max(0, min(18, int(math.log10(count)) // 3 * 3)) if count >= 1 else 0
    unit = {0: "", 3: "K", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}[power]
    return f"{f'{count / 10**power:#.3g}'.rstrip('.')} {unit}".rstrip()


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
