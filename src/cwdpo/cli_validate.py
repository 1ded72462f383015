"""``cwdpo validate``: what is wrong with a data set, or with the data of a recipe, before a GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cwdpo.cli_progress import row_bar
from cwdpo.errors import RecipeError

if TYPE_CHECKING:
    from cwdpo.data.lengths import LengthCounter
    from cwdpo.models.settings import ModelSettings


def validate(
    data: Annotated[
        str, typer.Argument(help="a file, a folder, a hub id, or a recipe (.yaml) whose data and model count")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    data_format: Annotated[str | None, typer.Option("--format", help="auto, or the name of a format")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="folder that image paths start from; default: the data's own")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="another set that may share no picture with this one")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="most tokens of prompt + longest response")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="count tokens as this checkpoint does; default: words")
    ] = None,
    fix: Annotated[Path | None, typer.Option(help="write the good rows to this new .jsonl file")] = None,
) -> None:
    """Say what was understood of a data set and what is wrong with it; exit code 1 when something is.

    A train file is compared with the validation and test files next to it: no picture may stand in both. A recipe
    says by itself what is read, how, and by whose tokens it is counted; options go before it.
    """
    from cwdpo.data.rows import count_rows, open_source
    from cwdpo.data.validate import validate as check
    from cwdpo.models.settings import ModelSettings

    given: dict[str, Any] = {"format": data_format, "image_root": image_root, "max_length": max_length}
    given = {key: value for key, value in given.items() if value is not None}
    settings = None if model is None else ModelSettings(path=model)
    if Path(data).suffix.lower() in (".yaml", ".yml"):
        data, said, own, held = _of_recipe(Path(data))
        given, settings, against = said | given, settings or own, [*held, *(against or ())]
    source = open_source(data)
    progress, stop = row_bar(source.name, count_rows(source))
    try:
        found = check(
            source, **given, against=against or (), fix=fix, progress=progress,
            lengths=None if settings is None else _token_counter(settings),
        )  # fmt: skip
    finally:
        stop()
    typer.echo(found.to_json() if as_json else found.to_text())
    if found.problems:
        raise typer.Exit(1)


def _of_recipe(path: Path) -> tuple[str, dict[str, Any], ModelSettings | None, list[str]]:
    """Of a recipe: the data, how it is read, the model whose tokens count, and what is held out."""
    from cwdpo.config import load_recipe

    recipe = load_recipe(path)
    data = recipe.data
    if data.path is None:
        raise RecipeError(f"{path}: data.world is drawn by cwdpo itself; only data.path can be validated")
    said: dict[str, Any] = {
        "format": data.format, "default_prompt": data.default_prompt, "captions_per_image": data.captions_per_image,
        "max_length": data.max_length, "image_root": None if data.image_root is None else Path(data.image_root),
    }  # fmt: skip
    model = None if recipe.model.path == "init" else recipe.model  # made later, tokenizer and all
    held = [] if data.validation_path is None else [data.validation_path]
    return data.path, said, model, held


def _token_counter(settings: ModelSettings) -> LengthCounter:
    from cwdpo.data.lengths import token_counter
    from cwdpo.models.checkpoint import check_folder
    from cwdpo.models.load import EMBEDDED, load_processor

    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    check_folder(source)
    return token_counter(load_processor(source, settings))
