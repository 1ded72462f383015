"""``cwdpo bench``: the training step against TRL's, and how its cost grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cwdpo.lab.bench.setting import Setting

app = typer.Typer(no_args_is_help=True, help="Measure the training step (needs TRL 1.16 for `step`).")


class Tune(StrEnum):
    """What is trained."""

    lora = "lora"
    full = "full"


class Reference(StrEnum):
    """Where our step finds the reference's values."""

    cached = "cached"
    live = "live"


class Shape(StrEnum):
    """Size of the Qwen2.5-VL with random weights."""

    small = "small"
    b3 = "3b"
    b7 = "7b"


PromptTokens = Annotated[int, typer.Option(min=32, help="nine tenths of them image tokens")]
CompletionTokens = Annotated[int, typer.Option(min=2)]
TuneOption = Annotated[Tune, typer.Option(help="LoRA on the text tower, or everything")]
Checkpointing = Annotated[bool, typer.Option("--grad-checkpointing", help="in both")]
Repeats = Annotated[int, typer.Option(min=1, help="alternating repetitions")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads")]
ShapeOption = Annotated[Shape, typer.Option(help="small is for a CPU")]
Cuda = Annotated[bool, typer.Option("--cuda", help="on the GPU, in bfloat16")]
VisionCache = Annotated[
    bool, typer.Option("--vision-cache", help="keep the frozen tower's image features, as training does")
]
AsJson = Annotated[bool, typer.Option("--json", help="for machines")]


@app.command()
def step(
    prompt_tokens: PromptTokens = 1024,
    completion_tokens: CompletionTokens = 64,
    negatives: Annotated[int, typer.Option(min=1, help="per prompt; TRL runs as many pairs")] = 1,
    tune: TuneOption = Tune.lora,
    reference: Annotated[Reference, typer.Option(help="ours; TRL has it live")] = Reference.cached,
    grad_checkpointing: Checkpointing = False,
    vision_cache: VisionCache = False,
    shape: ShapeOption = Shape.small,
    cuda: Cuda = False,
    repeats: Repeats = 5,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """One training step, paired with TRL's on the same model, batch and dtype."""
    from cwdpo.lab.bench.measure import step_report

    setting = _setting(
        prompt_tokens,
        completion_tokens,
        negatives,
        tune,
        reference,
        grad_checkpointing,
        vision_cache,
        shape,
        cuda,
    )
    found = step_report(setting, repeats, threads, _say())
    typer.echo(json.dumps(found, indent=1) if as_json else step_text(found))


@app.command()
def scale(
    prompt_tokens: PromptTokens = 1024,
    completion_tokens: CompletionTokens = 64,
    tune: TuneOption = Tune.lora,
    grad_checkpointing: Checkpointing = False,
    shape: ShapeOption = Shape.small,
    cuda: Cuda = False,
    repeats: Repeats = 5,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """How the step's cost grows with the number of negatives (1, 2, 4, 8) and with the prompt's length."""
    from cwdpo.lab.bench.measure import scale_report

    setting = _setting(
        prompt_tokens, completion_tokens, 1, tune, Reference.cached, grad_checkpointing, False, shape, cuda
    )
    found = scale_report(
        setting,
        negatives=(1, 2, 4, 8),
        prompts=(128, 256, 512, 1024),
        repeats=repeats,
        threads=threads,
        say=_say(),
    )
    typer.echo(json.dumps(found, indent=1) if as_json else scale_text(found))


@app.command()
def recipe(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    steps: Annotated[int, typer.Option(min=2, help="of each variant")] = 20,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Stage 2 of a recipe with and without shared-prefix scoring and batches by length, alternating."""
    from cwdpo.config import load_recipe
    from cwdpo.lab.bench.recipe import recipe_report

    found = recipe_report(load_recipe(path, overrides or ()), steps, threads, _say())
    typer.echo(json.dumps(found, indent=1) if as_json else recipe_text(found))


def _setting(
    prompt_tokens: int,
    completion_tokens: int,
    negatives: int,
    tune: Tune,
    reference: Reference,
    grad_checkpointing: bool,
    vision_cache: bool,
    shape: Shape,
    cuda: bool,
) -> Setting:
    from cwdpo.lab.bench.setting import Setting

    return Setting(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        negatives=negatives,
        tune=tune.value,
        reference=reference.value,
        grad_checkpointing=grad_checkpointing,
        shape=shape.value,
        dtype="bfloat16" if cuda else "float32",
        device="cuda" if cuda else "cpu",
        vision_cache=vision_cache,
    )


def _say() -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True)
    return lambda text: console.print(f"[dim]{text}[/dim]") if console.is_terminal else None


LABELS = {
    "trl": "TRL as it is",
    "trl_completions": "TRL, completion tokens only",
    "trl_cached": "... with reference values handed over (TRL refuses this for images)",
}


def step_text(found: dict[str, Any]) -> str:
    """The report for a person."""
    s = found["setting"]
    lines = [
        f"P = {s['prompt_tokens']}, C = {s['completion_tokens']}, K = {s['negatives']}, {s['tune']}, reference "
        f"{s['reference']}, {s['shape']} Qwen2.5-VL, {s['dtype']} on {found['device']}, {found['threads']} thread(s)"
        + (", gradient checkpointing" if s["grad_checkpointing"] else "")
        + (", image features kept" if s["vision_cache"] else ""),
        f"{'how many times as much as cwdpo':<68} time (least to greatest)   FLOPs   peak memory",
    ]
    for name, rival in found["rivals"].items():
        t = rival["time"]
        lines.append(
            f"{LABELS[name]:<68} {t['median']:5.2f} ({t['min']:.2f} to {t['max']:.2f})        {rival['flops']:6.2f}"
            f"   {rival['memory']:8.2f}"
        )
    seconds, gradient = found["seconds"]["cwdpo"], found["gradient"]
    lines.append(
        f"our step: {seconds:.3f} s, {found['peak_bytes']['cwdpo'] / 2**20:.0f} MiB; gradients differ by "
        f"{gradient['largest_difference']:.1e} at most, the largest is {gradient['largest']:.1e}"
    )
    return "\n".join(lines)


def recipe_text(found: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"{name:<7} {found[name]['tokens_per_second']:9.0f} tokens/s   "
        f"{found[name]['seconds_per_step']:.3f} s a step   padding {found[name]['padding']:.1%}"
        for name in ("before", "after")
    ]
    halves = " and ".join(f"{ratio:.2f}" for ratio in found["ratio_of_halves"])
    return "\n".join([*lines, f"ratio {found['ratio']:.2f} (halves of the steps: {halves})"])


def scale_text(found: list[dict[str, Any]]) -> str:
    """The report for a person."""
    lines = []
    for row in found:
        t = row["time"]
        name = row["what"].replace("_", " ")
        lines.append(f"{name:<14} {row['value']:>5}   {t['median']:5.2f} ({t['min']:.2f} to {t['max']:.2f})")
    return "\n".join(["relative cost of a step, against the first of each list", *lines])
