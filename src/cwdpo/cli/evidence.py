"""Commands about evidence: study, sweep, evaluation, comparison, export. Mounted by :mod:`cwdpo.cli.main`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

RECIPE = Annotated[Path, typer.Argument(help="a recipe (YAML)")]
STUDY = Annotated[str, typer.Option(help="a study file, or the name of a shipped study")]
JOBS = Annotated[int, typer.Option(min=1, help="parallel processes, one core each")]
ONLY = Annotated[
    list[str] | None, typer.Option(help="a variant to take (repeatable), with what it needs; default: all")
]
TEST = Annotated[Path | None, typer.Option(help="test set, for data that is not the embedded world's")]


def mount(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (evaluate, compare, export, ablate, sweep, margins):
        app.command()(command)
    app.command("best-of")(best_of)


def evaluate(
    model: Annotated[str, typer.Argument(help="a run folder, a model folder, 'embedded', or a hub id")],
    data: Annotated[str, typer.Option(help="a file, a folder, or a hub id")],
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="names with commas, or {name: ..., setting: ...}; default: what the data allows"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder; default RUN/evaluation, else runs/evaluation")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="responses per prompt")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="read this many examples only")] = None,
    data_format: Annotated[
        str, typer.Option("--format", help="auto, the name of a format, or file.py:ClassName")
    ] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    lmms_eval: Annotated[
        str | None, typer.Option("--lmms-eval", help="tasks for lmms-eval, with commas")
    ] = None,
    lmms_model: Annotated[str, typer.Option(help="lmms-eval's name of the model family")] = "llava_hf",
) -> None:
    """Answer a data set and measure the answers: every number with its n and a 95% interval over prompts."""
    from cwdpo.evaluation import run

    folder = out or _evaluation_folder(model)
    shown, stop = _bars()
    try:
        found = run.evaluate(
            model, data, folder, metrics=run.parse_specs(metrics or ()), temperature=temperature, samples=samples,
            max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
            data_options={"limit": limit, "format": data_format}, progress=shown,
        )  # fmt: skip
    finally:
        stop()
    for name, one in found["numbers"].items():
        typer.echo(f"{name:22} {_number(one)}")
    typer.echo(f"\nresponses  {folder / 'responses.jsonl'}\nfigures    {folder / 'evaluation.json'}")
    if lmms_eval:
        run.lmms_eval(run.loadable(model), lmms_eval, folder, model=lmms_model, batch_size=batch_size)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders that cwdpo evaluate measured on the same data")],
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "runs/comparison"
    ),
    metrics: Annotated[list[str] | None, typer.Option(help="default: those of the first run")] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="world, references, metric, reward_model, vlm, file.py:Class, or {name: ..., setting: ...}; none: no "
            "win rates; auto: world where the data is the world's, else none"
        ),
    ] = "auto",
) -> None:
    """Compare runs on the same prompts: paired differences, win rates with intervals, and a page."""
    from cwdpo.evaluation import run
    from cwdpo.report.render import write_report

    summary = run.compare(
        runs, out, metrics=run.parse_specs(metrics or ()), judge=run.parse_spec(judge), tell=typer.echo
    )
    for row in summary["differences"]:
        typer.echo(f"{row['ours']} minus {row['theirs']}:")
        for name, one in row["figures"].items():
            p = "" if one["p_corrected"] is None else f"  p={one['p_corrected']:.3f}  {one['word']}"
            typer.echo(f"  {name:22} {_number(one)}{p}")
    for row in summary["wins"]:
        typer.echo(
            f"{row['ours']} against {row['theirs']} ({row['kind']}, by {row['judge']}): {row['rate']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]  win {row['win']:.3f} tie {row['tie']:.3f} loss {row['loss']:.3f}"
        )
    for row in summary["strength"]:
        typer.echo(
            f"Bradley-Terry {row['name']}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    typer.echo(f"\nreport   {write_report(out)}")


def export(
    run: Annotated[Path, typer.Argument(help="a finished run")],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or absent")],
    merge: Annotated[bool, typer.Option("--merge", help="add a LoRA adapter to the base's weights")] = False,
    dtype: Annotated[str | None, typer.Option(help="of merged weights; default: the base's own")] = None,
) -> None:
    """Write the final model as a folder that AutoModelForImageTextToText, lmms-eval and vLLM load, with a card."""
    from cwdpo.pipeline.export import export as write

    typer.echo(write(run, out, merge=merge, dtype=dtype))


def _evaluation_folder(model: str) -> Path:
    return Path(model) / "evaluation" if (Path(model) / "recipe.yaml").is_file() else Path("runs/evaluation")


def _number(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "nothing to measure"
    bounds = "" if one["low"] is None else f" [{one['low']:.4f}, {one['high']:.4f}]"
    n = f"  n={one['n']}" if "n" in one else ""
    return f"{one['value']:.4f}{bounds}{n}"


def _bars() -> tuple[Callable[[str, int, int], None], Callable[[], None]]:
    """A bar per phase on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda phase, done, total: None, lambda: None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, Any] = {}
    bar.start()

    def shown(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done)

    return shown, bar.stop


def ablate(
    recipe: RECIPE,
    study: STUDY,
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 to N-1, the same for every variant")] = 5,
    jobs: JOBS = 2,
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<study>")] = None,
    tuned: Annotated[Path | None, typer.Option(help="the chosen.yaml of a sweep")] = None,
    only: ONLY = None,
    test: TEST = None,
) -> None:
    """Run a study: every variant at every seed, to a table with intervals and corrected p-values.

    Finished cells in the folder are used again, so a study that was cut off is continued by the same command.
    """
    from cwdpo.lab.ablate import ablate as run
    from cwdpo.lab.spec import load_chosen, load_study
    from cwdpo.lab.tables import markdown

    spec = load_study(study)
    folder = out or Path("runs") / spec.name
    chosen = load_chosen(tuned) if tuned else {}
    spec = spec.only(only) if only else spec
    summary = run(recipe, spec, folder, seeds=seeds, jobs=jobs, chosen=chosen, test=test)
    typer.echo(markdown(summary))
    typer.echo(f"Settings {summary['provenance']['settings']}.\n")
    typer.echo(
        f"table    {folder / 'table.md'}\nfigures  {folder / 'table.csv'}\nreport   {folder / 'report.html'}"
    )


def sweep(
    recipe: RECIPE,
    study: STUDY,
    finalists: Annotated[
        int, typer.Option(min=1, help="points per variant that run on the second seed too")
    ] = 3,
    jobs: JOBS = 2,
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<study>-sweep")] = None,
    only: ONLY = None,
    test: TEST = None,
) -> None:
    """Find every variant's best settings by the same budget, on validation pictures and seeds of its own."""
    from cwdpo.lab.ablate import sweep as run
    from cwdpo.lab.spec import load_study

    spec = load_study(study)
    spec = spec.only(only) if only else spec
    folder = out or Path("runs") / f"{spec.name}-sweep"
    found = run(recipe, spec, folder, finalists=finalists, jobs=jobs, test=test)
    for name, settings in found["chosen"].items():
        typer.echo(f"{name}: {' '.join(settings)}")
    for name, edges in found["edges"].items():
        typer.echo(f"{name}: {'; '.join(edges)}: widen its grid", err=True)
    typer.echo(f"\ntable    {folder / 'sweep.md'}\nchosen   {folder / 'chosen.yaml'}")


def best_of(
    data: Annotated[Path, typer.Argument(help="a .jsonl file of the embedded world")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    model: Annotated[
        str, typer.Option(help="what is sampled: 'embedded', a folder, or a hub id")
    ] = "embedded",
    n: Annotated[int, typer.Option(min=2, help="samples per prompt")] = 8,
    noise: Annotated[float, typer.Option(min=0, max=1, help="share of samples whose score is random")] = 0.3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a preference set whose chosen responses are only better: the best of n samples by a noisy judge."""
    from cwdpo.data.encode.encoder import Encoder
    from cwdpo.lab.best_of import write_best_of
    from cwdpo.models.load import load_policy
    from cwdpo.models.settings import ModelSettings

    policy = load_policy(ModelSettings(path=model))
    found = write_best_of(policy, Encoder(policy.processor), data, out, seed=seed, n=n, noise=noise)
    typer.echo(
        f"{found['rows']} rows ({found['left_out']} left out); chosen is right in every fact in "
        f"{found['chosen_right']:.3f}, mean score {found['chosen_score']:.3f}\n{out / 'train.jsonl'}"
    )


def margins(
    run: Annotated[Path, typer.Argument(help="a finished run whose stage 2 was dpo")],
    data: Annotated[Path, typer.Option(help="the .jsonl file that it was trained on")],
    out: Annotated[Path, typer.Option(help="folder to write; its train.jsonl holds the rows")],
) -> None:
    """Write every pair's reward margin by a DPO run into the data, for the madpo objective."""
    from cwdpo.config import load_recipe
    from cwdpo.lab.margins import write_margins
    from cwdpo.rundir import RunDir

    folder = RunDir.open(run).path
    recipe = load_recipe(folder / "recipe.yaml")
    first = folder / "stage1" / "model"
    reference = str(first) if first.is_dir() else recipe.model.path
    beta = float(recipe.stage2.objective.get("beta", 0.1))
    found = write_margins(
        folder / "model", reference, str(data), out, beta=beta, image_root=recipe.data.image_root
    )
    mean = "none" if found["mean"] is None else f"{found['mean']:.3f}, above 0 in {found['right']:.3f} of"
    typer.echo(
        f"{out}: mean margin {mean} {found['pairs']} pairs; a recipe needs data.image_root={data.parent}"
    )
