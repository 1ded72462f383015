"""``cwdpo train``, ``report``, ``init-model`` and ``recipe``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cwdpo import shipped
from cwdpo.arguments import check_trackers
from cwdpo.cli.common import TRAIN, Overrides, Recipe
from cwdpo.cli.data import validate_recipe
from cwdpo.cli.plan import plan_lines
from cwdpo.cli.progress import run_listener
from cwdpo.errors import DataError, RecipeError, RunDirError
from cwdpo.files.writing import write_text
from cwdpo.pipeline.planning.gpus import gpu_of
from cwdpo.rundir import RunDir

if TYPE_CHECKING:
    from cwdpo.config import Recipe as Settings


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    recipes = typer.Typer(no_args_is_help=True, help="The recipes of the package, and the schema of recipes.")
    for name, command in (
        ("list", recipe_list),
        ("show", recipe_show),
        ("copy", recipe_copy),
        ("schema", recipe_schema),
    ):
        recipes.command(name)(command)
    app.command(rich_help_panel=TRAIN)(train)
    app.add_typer(recipes, name="recipe", rich_help_panel=TRAIN)
    app.command("init-model", rich_help_panel=TRAIN)(init_model)


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<name>")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in the folder")] = False,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="start the run, or continue it: for launchers that restart it"),
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="with --resume: allow a changed recipe")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="validate and plan, and train nothing; needs --gpu")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="with --dry-run: the GPU to plan for")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="with --dry-run: number of GPUs")] = 1,
    data_file: Annotated[
        Path | None,
        typer.Option("--from", help="train on the pairs of this file, written by `cwdpo sample`"),
    ] = None,
) -> None:
    """Train both stages of a recipe on your model and data."""
    from cwdpo.config import load_recipe

    parsed = load_recipe(recipe, [*_pairs_of(data_file), *(overrides or ())])
    if dry_run:
        _validate_and_plan(parsed, gpu, gpus)
        return
    if gpu is not None or gpus > 1:
        raise typer.BadParameter("it is for --dry-run", param_hint="--gpu, --gpus")
    folder = out or Path("runs") / parsed.name
    first = os.environ.get("RANK", "0") == "0"  # the others may find what it began, or see no folder at all
    if resume and not auto_resume and first and not folder.is_dir():
        raise RunDirError(f"{folder}: no run to continue; leave out --resume to start one, or correct --out")
    resume = resume or auto_resume
    if accept_changes and not resume:
        raise typer.BadParameter("it needs --resume", param_hint="--accept-changes")
    if not resume and first:
        RunDir(folder).refuse_begun()  # now: torch and transformers take seconds to load
    check_trackers(parsed.train.report_to)
    from cwdpo.pipeline.two_stage import train_two_stage

    with run_listener() as listener:
        try:
            run = train_two_stage(
                parsed, folder, resume=resume, accept_changes=accept_changes, listener=listener
            )
        except KeyboardInterrupt:
            if (folder / "recipe.yaml").is_file():
                kept = _kept(parsed.train.save_steps)
                typer.echo(f"cwdpo: interrupted; {kept}: give the command again with --resume", err=True)
            raise
    if not run.writes:
        return
    typer.echo(
        f"model    {run.path / 'model'}\nfigures  {run.path / 'summary.json'}\nreport   {run.path / 'report.html'}\n"
        f"next     cwdpo diagnose {run.path}"
    )


def _validate_and_plan(parsed: Settings, gpu: str | None, gpus: int) -> None:
    """What `cwdpo validate` and `cwdpo plan` say of a recipe; exit code 1 if one of them would have it.

    Raises:
        RecipeError: --gpu is missing or unknown, or stage 2 has no negatives.
    """
    chosen = gpu_of(gpu)
    # A world is generated: nothing to validate.
    good = parsed.data.world is not None or validate_recipe(parsed)
    from cwdpo.pipeline.planning.run import Hardware, plan_run

    found = plan_run(parsed, Hardware(chosen, gpus))
    typer.echo("\n".join(plan_lines(found)))
    if not (good and found.possible):
        raise typer.Exit(1)


def _kept(save_steps: int | None) -> str:
    every = (
        "finished stages"
        if save_steps is None
        else f"finished stages and a checkpoint every {save_steps} steps"
    )
    return f"the run folder keeps {every}"


def init_model(
    out: Annotated[Path, typer.Argument(help="folder to write; must be empty or not exist")],
    texts: Annotated[
        Path | None, typer.Option(help="text file to train the tokenizer on, one text per line")
    ] = None,
    image_size: Annotated[int, typer.Option(help="width and height of images, in pixels")] = 48,
    width: Annotated[int, typer.Option(help="hidden size of the language model")] = 128,
    layers: Annotated[int, typer.Option(help="number of layers of the language model")] = 4,
    vocabulary: Annotated[int, typer.Option(help="number of tokens in the vocabulary")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a small LLaVA with random weights (model, processor, tokenizer) for quick tests."""
    from cwdpo.errors import ModelError
    from cwdpo.files.writing import clear_unfinished, new_folder
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
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty: choose another folder, or remove it first")
    clear_unfinished(out)
    with new_folder(out) as temporary:
        write(temporary, lines, settings)
    typer.echo(out)


def recipe_list() -> None:
    """List the recipes of the package; `cwdpo train NAME` runs one."""
    width = max(map(len, shipped.names()))
    for name in shipped.names():
        typer.echo(f"{name:{width}}  {shipped.summary(name)}")


def recipe_show(name: Annotated[str, typer.Argument(help="see `cwdpo recipe list`")]) -> None:
    """Print a recipe of the package."""
    typer.echo(shipped.text(name), nl=False)


def recipe_copy(
    name: Annotated[str, typer.Argument(help="see `cwdpo recipe list`")],
    file: Annotated[Path | None, typer.Argument(help="default: NAME.yaml")] = None,
) -> None:
    """Copy a recipe of the package into a file of your own, to edit it."""
    target = file or Path(f"{name}.yaml")
    text = shipped.text(name)
    if target.exists():
        raise RecipeError(f"{target} exists: give another name, or remove it first")
    write_text(target, text)
    typer.echo(f"{target}: edit it, then: cwdpo validate {target}")


def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from cwdpo.schema import recipe_schema as schema

    typer.echo(json.dumps(schema(), indent=1))


def _pairs_of(file: Path | None) -> list[str]:
    """Overrides to train on a file of pairs with its own negatives."""
    if file is None:
        return []
    return [
        f"data.path={json.dumps(str(file))}",
        "data.sources=[]",
        "data.format=trl",
        "data.image_root=null",
        "negatives={mix: {dataset: 1.0}}",
    ]


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
