"""``cwdpo bench``: compares the training step with TRL's, and measures how its cost grows."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cwdpo.cli.common import AsJson, Overrides, Recipe
from cwdpo.lab.bench.setting import Setting

app = typer.Typer(no_args_is_help=True, help="Measure the training step (needs TRL 1.16 for `step`).")


class Tune(StrEnum):
    """Which weights are trained."""

    lora = "lora"
    full = "full"


class Reference(StrEnum):
    """Whether our step uses stored reference values or runs the reference model."""

    cached = "cached"
    live = "live"


class Shape(StrEnum):
    """Size of the Qwen2.5-VL with random weights."""

    small = "small"
    b3 = "3b"
    b7 = "7b"


Repeats = Annotated[int, typer.Option(min=1, help="number of repetitions; each runs every variant once")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads")]


def setting_of(
    prompt_tokens: Annotated[
        int, typer.Option(min=32, help="tokens of the prompt; nine tenths are image tokens")
    ] = 1024,
    completion_tokens: Annotated[int, typer.Option(min=2, help="tokens of each completion")] = 64,
    tune: Annotated[Tune, typer.Option(help="LoRA on the language model, or all weights")] = Tune.lora,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="gradient checkpointing, in both trainers")
    ] = False,
    shape: Annotated[Shape, typer.Option(help="size of the model; small is for a CPU")] = Shape.small,
    cuda: Annotated[bool, typer.Option("--cuda", help="run on the GPU, in bfloat16")] = False,
) -> Setting:
    """The setting of both measurements; these parameters are options of both commands."""
    return Setting(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, tune=tune.value, shape=shape.value,
        grad_checkpointing=grad_checkpointing, dtype="bfloat16" if cuda else "float32",
        device="cuda" if cuda else "cpu",
    )  # fmt: skip


def with_setting(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``setting`` of a command by the options of :func:`setting_of`.

    typer reads a command's options from its signature, so the wrapper gets a signature with both sets of parameters.
    """
    shared, own = (dict(inspect.signature(f, eval_str=True).parameters) for f in (setting_of, command))
    del own["setting"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(setting=setting_of(**{name: given.pop(name) for name in shared}), **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared.values(), *own.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@app.command()
@with_setting
def step(
    setting: Setting,
    negatives: Annotated[
        int, typer.Option(min=1, help="negatives per prompt; TRL runs the same number of pairs")
    ] = 1,
    reference: Annotated[
        Reference, typer.Option(help="reference values of our step; TRL always runs the reference")
    ] = Reference.cached,
    vision_cache: Annotated[
        bool,
        typer.Option(
            "--vision-cache", help="keep the image features of the frozen vision tower, as training does"
        ),
    ] = False,
    repeats: Repeats = 5,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Compare one training step with TRL's, on the same model, batch and dtype."""
    from cwdpo.lab.bench.measure import step_report

    setting = replace(setting, negatives=negatives, reference=reference.value, vision_cache=vision_cache)
    report = step_report(setting, repeats, threads, _say())
    typer.echo(json.dumps(report, indent=1) if as_json else step_text(report))


@app.command()
@with_setting
def scale(setting: Setting, repeats: Repeats = 5, threads: Threads = 1, as_json: AsJson = False) -> None:
    """Measure how the cost of a step grows with the number of negatives (1, 2, 4, 8) and with the prompt length."""
    from cwdpo.lab.bench.measure import scale_report

    report = scale_report(
        setting, negatives=(1, 2, 4, 8), prompts=(128, 256, 512, 1024), repeats=repeats, threads=threads, say=_say()
    )  # fmt: skip
    typer.echo(json.dumps(report, indent=1) if as_json else scale_text(report))


@app.command()
def recipe(
    path: Recipe,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps of each variant")] = 20,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Compare stage 2 of a recipe with and without shared-prefix scoring and batches by length."""
    from cwdpo.config import load_recipe
    from cwdpo.lab.bench.recipe import recipe_report

    report = recipe_report(load_recipe(path, overrides or ()), steps, threads, _say())
    typer.echo(json.dumps(report, indent=1) if as_json else recipe_text(report))


@app.command("end-to-end")
def end_to_end(
    prompt_tokens: Annotated[int, typer.Option(min=32, help="about; nine tenths are image tokens")] = 256,
    completion_tokens: Annotated[int, typer.Option(min=2, help="about, of each response")] = 64,
    tune: Annotated[Tune, typer.Option(help="LoRA on the language model, or all weights")] = Tune.lora,
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a step")] = 8,
    rows: Annotated[
        int | None, typer.Option(min=16, help="training rows; default: as many as the steps take")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images, on both sides")] = 0,
    unchanged: Annotated[
        bool, typer.Option("--unchanged", help="TRL as it is on a CPU: it scores every position")
    ] = False,
    repeats: Repeats = 1,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Compare whole runs of stage 2 with TRL's DPOTrainer, from process start to saved model, with our defaults."""
    from cwdpo.lab.bench.end_to_end import end_to_end_report
    from cwdpo.lab.bench.job import Job

    job = Job(
        prompt_tokens,
        completion_tokens,
        tune.value,
        steps,
        batch_size,
        rows or steps * batch_size,
        workers,
        threads,
    )
    report = end_to_end_report(job, repeats, _say(), completions_only=not unchanged)
    typer.echo(json.dumps(report, indent=1) if as_json else end_to_end_text(report))


@app.command()
def data(
    path: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="rows to read, repeated if the data has fewer")] = 256,
    step: Annotated[
        float, typer.Option(min=0, help="seconds of a step on the accelerator, in which this process sleeps")
    ] = 1.0,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, help="number of workers; may be repeated")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how long training steps wait for images, by train.dataloader_workers."""
    from cwdpo.config import load_recipe
    from cwdpo.lab.bench.data import data_report

    report = data_report(load_recipe(path, overrides or ()), rows, step, workers or (0, 1, 2, 4), _say())
    typer.echo(json.dumps(report, indent=1) if as_json else data_text(report))


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="the report, JSON; written after every part")] = Path(
        "bench-gpu.json"
    ),
    prompt_tokens: Annotated[
        int, typer.Option(min=32, help="tokens of the prompt; nine tenths are image tokens")
    ] = 1024,
    completion_tokens: Annotated[int, typer.Option(min=2, help="tokens of each completion")] = 64,
    minutes: Annotated[float, typer.Option(min=0, help="parts that would end later are left out")] = 8.0,
    repeats: Repeats = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 8,
    cpu: Annotated[bool, typer.Option("--cpu", help="the small model on the CPU, to try the call")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure everything that needs a GPU in one call: exactness, step against TRL, memory, images, sampling.

    Models have the published sizes of Qwen2.5-VL 3B and 7B and random weights in bfloat16; nothing is downloaded.
    """
    from cwdpo.lab.bench.gpu import check_gpu, gpu_report

    if not cpu:
        check_gpu()
    setting = Setting(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, device="cpu" if cpu else "cuda",
        dtype="float32" if cpu else "bfloat16",
    )  # fmt: skip
    report = gpu_report(setting, out, minutes=minutes, repeats=repeats, threads=threads, say=_say())
    typer.echo(json.dumps(report, indent=1) if as_json else gpu_text(report))
    typer.echo(f"report   {out}", err=as_json)


def _say() -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True)
    return lambda text: console.print(f"[dim]{text}[/dim]") if console.is_terminal else None


LABELS = {
    "trl": "TRL, unchanged",
    "trl_completions": "TRL, completion tokens only",
    "trl_cached": "... with given reference values (TRL does not support this for images)",
}


def step_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    s = report["setting"]
    lines = [
        f"P = {s['prompt_tokens']}, C = {s['completion_tokens']}, K = {s['negatives']}, {s['tune']}, reference "
        f"{s['reference']}, {s['shape']} Qwen2.5-VL, {s['dtype']} on {report['device']}, {report['threads']} thread(s)"
        + (", gradient checkpointing" if s["grad_checkpointing"] else "")
        + (", image features kept" if s["vision_cache"] else ""),
        f"{'how many times as much as cwdpo':<68} time (least to greatest)   FLOPs   peak memory",
    ]
    for name, rival in report["rivals"].items():
        t = rival["time"]
        lines.append(
            f"{LABELS[name]:<68} {t['median']:5.2f} ({t['min']:.2f} to {t['max']:.2f})        {rival['flops']:6.2f}"
            f"   {rival['memory']:8.2f}"
        )
    seconds, gradient = report["seconds"]["cwdpo"], report["gradient"]
    lines.append(
        f"our step: {seconds:.3f} s, {report['peak_bytes']['cwdpo'] / 2**20:.0f} MiB; gradients differ by "
        f"{gradient['largest_difference']:.1e} at most, the largest is {gradient['largest']:.1e}"
    )
    return "\n".join(lines)


def end_to_end_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    job, gradient = report["job"], report["gradient"]
    lines = [
        f"P about {job['prompt_tokens']}, C about {job['completion_tokens']}, {job['tune']}, {job['steps']} steps of "
        f"{job['batch_size']} rows, {job['rows']} rows, {job['workers']} workers, {job['threads']} thread(s)",
        f"gradients of a DPO step differ by {gradient['largest_difference']:.1e} at most, the largest is "
        f"{gradient['largest']:.1e}",
    ]
    for side, runs in report["runs"].items():
        for run in runs:
            lines.append(
                f"{side:<29} {run['wall']:8.1f} s {run['cpu']:8.1f} s of CPU   {run['peak_bytes'] / 2**30:.2f} GiB"
            )
            parts = sorted(run["phases"].items(), key=lambda item: -item[1][1])
            lines += [
                f"   {name:<26} {wall:8.1f} s {cpu:8.1f} s" for name, (wall, cpu) in parts if wall >= 0.05
            ]
    for key, name in (("wall", "time"), ("cpu", "CPU time")):
        r = report["ratio"][key]
        lines.append(f"TRL / cwdpo, {name}: {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})")
    for row in report["extrapolated"]:
        lines.append(
            f"extrapolated from these parts to {row['rows']} rows, {row['epochs']} epoch(s), {row['steps']} steps: "
            f"time {row['wall']['ratio']:.2f}, CPU time {row['cpu']['ratio']:.2f}"
        )
    return "\n".join(lines)


def recipe_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"{name:<7} {report[name]['tokens_per_second']:9.0f} tokens/s   "
        f"{report[name]['seconds_per_step']:.3f} s a step   padding {report[name]['padding']:.1%}"
        for name in ("before", "after")
    ]
    halves = " and ".join(f"{ratio:.2f}" for ratio in report["ratio_of_halves"])
    return "\n".join([*lines, f"ratio {report['ratio']:.2f} (halves of the steps: {halves})"])


def data_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"{report['rows']} rows, {report['batch_size']} a step of {report['step']:g} s; a row: decoding "
        f"{report['decode']:.0f} ms, processing {report['process']:.0f} ms; or a read from data.image_cache "
        f"{report['stored']:.0f} ms; {report['bytes'] / 2**20:.1f} MiB",
        "workers   rows/s   waiting for images   the main process's CPU",
    ]
    for row in report["workers"]:
        lines.append(
            f"{row['n']:>7}   {row['rows_per_second']:6.2f}   {row['waiting']:18.1%}   {row['own_cpu']:.0f} ms a row"
        )
    return "\n".join(lines)


def gpu_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    device = report["device"]
    memory = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
    lines = [f"{device['name']}{memory}"]
    for name, part in report["parts"].items():
        lines.append(f"\n{name} ({report['seconds'][name]:.0f} s)")
        reason = next(
            (f"{k.replace('_', ' ')}: {part[k]}" for k in ("failed", "left_out") if k in part), None
        )
        lines.append(reason or _PARTS[name.split()[0]](part))
    return "\n".join(lines)


def _exactness_text(part: dict[str, Any]) -> str:
    return "\n".join(
        f"{name:<55} largest {gap['largest']:.2e}, mean {gap['mean']:.2e} nats" for name, gap in part.items()
    )


def _batches_text(part: list[dict[str, Any]]) -> str:
    lines = ["prompts  checkpointing   planned GiB   measured GiB   seconds"]
    for row in part:
        measured = "does not fit" if not row["fits"] else "-"
        if row["measured"] is not None:
            measured = f"{row['measured'] / 2**30:.2f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.3f}"
        lines.append(
            f"{row['prompts']:>7}  {'yes' if row['checkpointing'] else 'no':>13}   {row['planned'] / 2**30:11.2f}   "
            f"{measured:>12}   {seconds:>7}"
        )
    return "\n".join(lines)


def _sampling_text(part: dict[str, Any]) -> str:
    rates, t = part["tokens_per_second"], part["time"]
    return (
        f"{part['prompts']} prompts x {part['samples']} samples: {rates['cwdpo']:.0f} tokens/s, generate "
        f"{rates['generate']:.0f}; {t['median']:.2f} times ({t['min']:.2f} to {t['max']:.2f})"
    )


_PARTS: dict[str, Callable[[Any], str]] = {
    "exactness": _exactness_text, "step": step_text, "batches": _batches_text, "images": data_text,
    "sampling": _sampling_text,
}  # fmt: skip


def scale_text(report: list[dict[str, Any]]) -> str:
    """The report for a person."""
    lines = []
    for row in report:
        t = row["time"]
        name = row["what"].replace("_", " ")
        lines.append(f"{name:<14} {row['value']:>5}   {t['median']:5.2f} ({t['min']:.2f} to {t['max']:.2f})")
    return "\n".join(["relative cost of a step, against the first of each list", *lines])
