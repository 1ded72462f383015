"""The command line. Help and schema load no torch: heavy rooms are imported inside the commands."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cwdpo.cli import evidence as cli_evidence
from cwdpo.cli import watch as cli_dynamics
from cwdpo.cli.bench import app as bench_app
from cwdpo.cli.progress import run_listener
from cwdpo.cli.sample import sample
from cwdpo.cli.validate import validate
from cwdpo.data.problems import printable
from cwdpo.errors import CwdpoError, MissingPackageError, RunDirError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Cooling-Weighted DPO for vision-language models.",
)
_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip
recipe_app = typer.Typer(no_args_is_help=True, help="About recipes.")
app.add_typer(recipe_app, name="recipe")
cli_evidence.mount(app)
app.add_typer(bench_app, name="bench")
app.command()(sample)
app.command()(validate)
cli_dynamics.mount(app)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as you like")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(min=1, help="parallel processes, one core each")] = 2,
) -> None:
    """Compare continued SFT, DPO, DPO + SFT and CW-DPO on the embedded world (minutes on 2 cores)."""
    from cwdpo.lab.demo import DemoSettings, run_demo
    from cwdpo.lab.table import print_tables

    summary = run_demo(out, DemoSettings(workers=workers))
    print_tables(summary)
    typer.echo(f"\nfigures  {out / 'summary.json'}\nreport   {out / 'report.html'}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe (YAML)")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<name>")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in the folder")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="with --resume: go on with a changed recipe")
    ] = False,
    data_file: Annotated[
        Path | None,
        typer.Option("--from", help="train on the pairs of this file, as `cwdpo sample` wrote them"),
    ] = None,
) -> None:
    """Run both stages of a recipe on your model and data."""
    from cwdpo.config import load_recipe

    parsed = load_recipe(recipe, [*_pairs_of(data_file), *(overrides or ())])
    folder = out or Path("runs") / parsed.name
    if resume and not folder.is_dir():
        raise RunDirError(f"{folder}: no run to continue; leave out --resume to start one, or correct --out")
    if accept_changes and not resume:
        raise typer.BadParameter("it goes with --resume", param_hint="--accept-changes")
    _refuse_absent(parsed.train.report_to)
    from cwdpo.pipeline.two_stage import train_two_stage

    listener, stop = run_listener()
    try:
        run = train_two_stage(parsed, folder, resume=resume, accept_changes=accept_changes, listener=listener)
    finally:
        stop()
    if not run.writes:
        return
    typer.echo(
        f"model    {run.path / 'model'}\nfigures  {run.path / 'summary.json'}\nreport   {run.path / 'report.html'}"
    )


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


def _pairs_of(file: Path | None) -> list[str]:
    """Overrides that make a file of pairs the data, with its negatives as they are."""
    if file is None:
        return []
    return [
        f"data.path={json.dumps(str(file))}",
        "data.format=trl",
        "data.image_root=null",
        "negatives={mix: {dataset: 1.0}}",
    ]


def _read_lines(path: Path) -> list[str]:
    from cwdpo.errors import DataError

    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _refuse_absent(trackers: tuple[str, ...]) -> None:
    """Before anything is written: transformers asks for trackers when data and model are loaded already."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(
                f"train.report_to: the tracker {name!r} is not installed: pip install {name}, or leave it out"
            )


def _disk_trouble(error: Exception) -> str | None:
    """What a full, read-only or broken disk did, in our words; ``None`` for any other error.

    safetensors and torch raise errors of their own, which only their text tells apart.
    """
    text, place = str(error), "a file of the run"
    found = re.search(r"\(os error (\d+)\)", text) if type(error).__name__ == "SafetensorError" else None
    number = int(found[1]) if found else getattr(error, "errno", None)
    if isinstance(error, RuntimeError) and re.search(r"inline_container|PytorchStreamWriter", text):
        number = errno.ENOSPC
    if number not in _DISK_ERRORS:
        return None
    if isinstance(error, OSError) and error.filename:
        place = str(error.filename)
    remedy = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "choose a place that you may write to"
    return (
        f"{place}: the disk refuses ({os.strerror(number)}); what was written before is whole: {remedy}, then "
        "continue with --resume, or choose another --out"
    )


def main() -> None:
    """Entry point: errors that cwdpo raises on purpose, and those of a disk, are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):  # paths may hold bytes that are no text in any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except CwdpoError as error:
        typer.echo(f"cwdpo: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        trouble = _disk_trouble(error)
        if trouble is None:
            raise
        typer.echo(f"cwdpo: {printable(trouble)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
