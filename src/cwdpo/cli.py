"""The command line. Help and schema load no torch: heavy rooms are imported inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cwdpo.errors import CwdpoError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Cooling-Weighted DPO for vision-language models.",
)
recipe_app = typer.Typer(no_args_is_help=True, help="About recipes.")
app.add_typer(recipe_app, name="recipe")

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as you like")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(min=1, help="parallel processes, one core each")] = 2,
) -> None:
    """Compare continued SFT, DPO, DPO + SFT and CW-DPO on the embedded world (minutes on 2 cores)."""
    from cwdpo.study.demo import DemoSettings, run_demo
    from cwdpo.study.table import print_tables

    summary = run_demo(out, DemoSettings(workers=workers))
    print_tables(summary)
    typer.echo(f"\nfigures  {out / 'summary.json'}\nreport   {out / 'report.html'}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe (YAML)")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<name>")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in the folder")] = False,
) -> None:
    """Run both stages of a recipe on your model and data."""
    from cwdpo.config import load_recipe

    parsed = load_recipe(recipe, overrides or ())
    from cwdpo.training.two_stage import train_two_stage

    listener, stop = _listener()
    try:
        run = train_two_stage(parsed, out, resume=resume, listener=listener)
    finally:
        stop()
    typer.echo(
        f"model    {run.path / 'model'}\nfigures  {run.path / 'summary.json'}\nreport   {run.path / 'report.html'}"
    )


@app.command()
def validate(
    data: Annotated[str, typer.Argument(help="a file, a folder, or a hub id")],
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    data_format: Annotated[str, typer.Option("--format", help="auto, or the name of a format")] = "auto",
) -> None:
    """Say what was understood of a data set and what is wrong with it; exit code 1 when something is."""
    from cwdpo.data.validate import validate as check

    report = check(data, format=data_format)
    typer.echo(report.to_json() if as_json else report.to_text())
    if report.problems:
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html again from a run folder."""
    from cwdpo.report.render import write_report
    from cwdpo.rundir import RunDir

    RunDir.open(run)
    typer.echo(write_report(run))


@app.command("init-model")
def init_model(
    out: Annotated[Path, typer.Argument(help="folder to write; must be empty or absent")],
    texts: Annotated[
        Path | None, typer.Option(help="text file to train the tokenizer on, a text per line")
    ] = None,
    image_size: Annotated[int, typer.Option(help="pixels")] = 48,
    width: Annotated[int, typer.Option(help="hidden size of the text tower")] = 128,
    layers: Annotated[int, typer.Option(help="layers of the text tower")] = 4,
    vocabulary: Annotated[int, typer.Option(help="tokens")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a small random LLaVA folder (model, processor, tokenizer) for smoke runs."""
    from cwdpo.models.tiny import TinyModelSettings
    from cwdpo.models.tiny import init_model as write

    if texts is not None:
        lines = _read_lines(texts)
    else:
        from cwdpo.worlds.shapes import VOCABULARY

        lines = [" ".join(VOCABULARY)]
    settings = TinyModelSettings(
        image_size=image_size, width=width, layers=layers, vocabulary=vocabulary, seed=seed
    )
    typer.echo(write(out, lines, settings))


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from cwdpo.config import recipe_schema as schema

    typer.echo(json.dumps(schema(), indent=1))


def _read_lines(path: Path) -> list[str]:
    from cwdpo.errors import DataError

    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _listener() -> tuple[Any, Any]:
    """A progress line on stderr, on the main process only."""
    import os

    from cwdpo.training.stage import Listener

    if os.environ.get("RANK", "0") != "0":
        return Listener(), lambda: None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    bar.start()

    def step(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    return Listener(phase=lambda text: bar.console.print(text, markup=False), step=step), bar.stop


def main() -> None:
    """Entry point: errors that cwdpo raises on purpose are printed without a traceback."""
    try:
        app(standalone_mode=True)
    except CwdpoError as error:
        typer.echo(f"cwdpo: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
