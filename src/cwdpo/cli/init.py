"""``cwdpo init``: writes a recipe that fits a model, a data set and a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cwdpo.cli.common import TRAIN, AsJson
from cwdpo.errors import RecipeError
from cwdpo.files.writing import write_text
from cwdpo.pipeline.planning.gpus import GPUS, gpu_of, in_units

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from cwdpo.pipeline.first_recipe.make import FirstRecipe

EXAMPLE = "Qwen/Qwen2.5-VL-3B-Instruct"


def mount(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(rich_help_panel=TRAIN)(init)


def init(
    model: Annotated[str | None, typer.Option(help="folder of a checkpoint, or hub id (owner/name)")] = None,
    data: Annotated[str | None, typer.Option(help="your rows: a file, a folder, or a hub id")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="name of the GPU: h100, a100-80, 4090, ...; a wrong name lists all")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="number of GPUs")] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0, help="memory of a GPU, in GiB; default: of --gpu")
    ] = None,
    tune: Annotated[str, typer.Option(help="lora, or full: all weights, where that fits")] = "lora",
    objective: Annotated[
        str | None, typer.Option(help="objective of stage 2; default: by the rows (docs/choosing.md)")
    ] = None,
    out: Annotated[Path, typer.Option(help="the recipe to write")] = Path("recipe.yaml"),
    yes: Annotated[
        bool, typer.Option("--yes", help="ask nothing, and replace the file if it exists")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe for your rows, model and GPU: settings that fit, each with its reason.

    Of the model only configuration, tokenizer and processor are read. In a terminal, what is not given is asked for.
    """
    if out.exists() and not yes:
        raise RecipeError(f"{out} exists: give another --out, or --yes to replace it")
    chosen_tune = _tune(tune)
    model = _asked(model, "--model", "Model: a folder, or a hub id", yes, EXAMPLE)
    data = _asked(data, "--data", "Data: a file, a folder, or a hub id", yes)
    chosen = gpu_of(_asked(gpu, "--gpu", f"GPU: {', '.join(GPUS)}", yes), gpu_memory)
    from cwdpo.pipeline.first_recipe.decide import Asked
    from cwdpo.pipeline.first_recipe.make import first_recipe
    from cwdpo.pipeline.planning.run import Hardware

    asked = Asked(out.stem, model, data, objective)
    with _said() as say:
        made = first_recipe(asked, Hardware(chosen, gpus), chosen_tune, say)
    write_text(out, made.text)
    steps = next_steps(out, made)
    if as_json:
        typer.echo(json.dumps({"recipe": str(out), **made.to_json(), "next": steps}, indent=1))
    else:
        typer.echo("\n".join(_lines(out, made, steps)))


def next_steps(out: Path, made: FirstRecipe) -> list[str]:
    """The commands that come next."""
    gpu, gpus = made.hardware.gpu, made.hardware.gpus
    named = f"--gpu {gpu.name}" + (f" --gpus {gpus}" if gpus > 1 else "")
    check = f"cwdpo train {out} --dry-run {named}"
    more = " --fsdp" * made.sharded + f" --gpu-memory {gpu.memory_gib:g}" * (gpu != GPUS[gpu.name])
    if more:
        check = f"cwdpo plan {out} {named}{more}"
    start = "cwdpo train"
    if made.sharded:
        start = f"accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes {gpus} -m cwdpo train"
    elif gpus > 1:
        start = f"torchrun --nproc_per_node {gpus} -m cwdpo train"
    return [f"cwdpo validate {out}", check, f"{start} {out}"]


def _lines(out: Path, made: FirstRecipe, steps: list[str]) -> Iterator[str]:
    rows, found, hardware = made.rows, made.found, made.hardware
    usable = f"{rows.rows} usable rows" if rows.whole else f"about {rows.rows} usable rows"
    kinds = {
        "edits": "rejected are edits of chosen", "others": "rejected are responses of their own",
        "none": "no rejected responses",
    }  # fmt: skip
    yield f"data     {rows.path}: format {rows.format}, {usable}, {rows.bad} bad; {kinds[rows.rejected]}"
    if rows.problems:
        yield from (f"         {line}" for line in rows.problems.splitlines())
    for one in found.tried:
        yield f"{'fits' if one.fits else 'too much'}".ljust(9) + one.said()
    room = f"{hardware.gpu.memory_gib:g} GiB of {hardware.gpu.name}"
    memory = found.memory
    yield f"memory   {in_units(memory.total)} of the {room}, at a micro-batch of {memory.tokens} tokens"
    yield f"recipe   {out}: every key has its reason; change what you know better"
    for number, step in enumerate(steps):
        yield f"{'next' if not number else ''}".ljust(9) + step


def _tune(name: str) -> Literal["lora", "full"]:
    if name == "lora":
        return "lora"
    if name == "full":
        return "full"
    raise typer.BadParameter(f"{name!r}; allowed: lora, full", param_hint="--tune")


def _asked(value: str | None, option: str, question: str, yes: bool, default: str | None = None) -> str:
    """The option's value, or the user's answer.

    Raises:
        RecipeError: it is missing and nobody can be asked.
    """
    if value is not None:
        return value
    if yes or not sys.stdin.isatty():
        raise RecipeError(f"{option} is missing: give it (in a terminal, without --yes, it is asked for)")
    return str(typer.prompt(question, default=default))


@contextmanager
def _said() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is done; nothing where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update
