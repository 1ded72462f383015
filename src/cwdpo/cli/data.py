"""``cwdpo validate`` checks a data set; ``cwdpo sample`` makes one from a policy's samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cwdpo.cli.common import DATA, AsJson, Overrides
from cwdpo.cli.progress import bars, run_listener
from cwdpo.cli.show import print_rows
from cwdpo.data.read.dataset_info import NAME
from cwdpo.errors import RecipeError
from cwdpo.negatives.settings import WITHOUT_NEGATIVES
from cwdpo.shipped import is_name

if TYPE_CHECKING:
    from cwdpo.config import Recipe
    from cwdpo.data.encode.encoder import Encoder
    from cwdpo.data.validate.lengths import LengthCounter
    from cwdpo.data.validate.report import ValidationReport
    from cwdpo.data.validate.show import ShownRow
    from cwdpo.data_settings import DataSettings
    from cwdpo.models.settings import ModelSettings


Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(
        help="local: this process samples; ray: several processes of Ray Data do, on this machine or a cluster, with "
        "the same result (pip install 'cwdpo[ray]')"
    ),
]
Actors = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="with --engine ray: processes that each hold the model; default: one for each GPU, one if there is none",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="with --engine ray: a cluster to join, for example auto or 10.0.0.1:6379; default: Ray is started on this "
        "machine, and ended with the command"
    ),
]


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (validate, sample):
        app.command(rich_help_panel=DATA)(command)


def validate(
    data: Annotated[
        str, typer.Argument(help="a file, a folder, a hub id, or a recipe: its file or shipped name")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
    data_format: Annotated[
        str | None, typer.Option("--format", help="auto, the name of a format, or file.py:ClassName")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="a column to ignore; may be given several times")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="folder that image paths are relative to; default: the data's folder")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="another data set that must not have an image of this one")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="largest number of tokens of prompt + longest response")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="count tokens with this checkpoint's tokenizer; default: count words")
    ] = None,
    fix: Annotated[Path | None, typer.Option(help="write the good rows to this new .jsonl file")] = None,
    show: Annotated[
        int, typer.Option(min=0, help="show this many rows as the model sees them: prompt and trained tokens")
    ] = 0,
) -> None:
    """Show how a data set is read and what is wrong with it; exit code 1 if there are problems.

    A train file is compared with the validation and test files next to it: no image may be in both. With a recipe, its
    settings say what is read, how, and with which tokenizer, and its held-out set is checked, too; options override
    the recipe. All rows are read, even if data.limit is set (with data.streaming, a window).
    """
    from cwdpo.models.settings import ModelSettings

    how: dict[str, Any] = {
        "format": data_format, "image_root": image_root, "max_length": max_length, "ignore_columns": ignore,
    }  # fmt: skip
    how = {key: value for key, value in how.items() if value is not None}
    settings, lacking = None if model is None else ModelSettings(path=model), None
    if is_name(data) or (NAME not in data and Path(data).suffix.lower() in (".yaml", ".yml")):
        recipe = _with_data(Path(data), overrides or ())
        if settings is None and recipe.model.path != "init":  # the tokenizer of `init` does not exist yet
            settings = recipe.model
        sources = [(str(own.path), _how(own, how), own.looked_at) for own in recipe.data.each()]
        reports, lacking = _of_recipe(recipe, how, settings, against or (), fix)
    elif overrides:
        raise typer.BadParameter(
            f"{overrides[0]!r} is for a recipe, but {data!r} is not one", param_hint="OVERRIDES"
        )
    else:
        reports, sources = [_checked(data, how, settings, against or (), fix)], [(data, how, None)]
    typer.echo("\n".join(report.to_json() if as_json else report.to_text() for report in reports))
    _show([row for one in sources if show for row in _rows_to_show(*one, settings, show)], as_json)
    if lacking:
        raise RecipeError(f"{data}: {lacking}")
    if any(report.problems for report in reports):
        raise typer.Exit(1)


def validate_recipe(recipe: Recipe) -> bool:
    """Print what `cwdpo validate` says of a recipe without ``data.world``; whether the rows have no problems.

    Raises:
        RecipeError: stage 2 has no negatives.
    """
    settings = None if recipe.model.path == "init" else recipe.model
    reports, lacking = _of_recipe(recipe, {}, settings, (), None)
    typer.echo("\n".join(report.to_text() for report in reports))
    if lacking:
        raise RecipeError(lacking)
    return not any(report.problems for report in reports)


def _show(rows: list[ShownRow], as_json: bool) -> None:
    if rows and as_json:
        typer.echo(json.dumps({"shown": [row.to_dict() for row in rows]}, ensure_ascii=False))
    else:
        print_rows(rows)


def _with_data(path: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe whose data can be validated.

    Raises:
        RecipeError: its data are generated.
    """
    from cwdpo.config import load_recipe

    recipe = load_recipe(path, overrides)
    if recipe.data.world is not None:
        raise RecipeError(f"{path}: data.world is generated by cwdpo; only data.path can be validated")
    return recipe


def _how(data: DataSettings, given: Mapping[str, Any]) -> dict[str, Any]:
    """How a recipe's data are read; options override it."""
    return {**data.reading, "max_length": data.max_length, **given}


def _of_recipe(
    recipe: Recipe,
    how: Mapping[str, Any],
    settings: ModelSettings | None,
    against: Sequence[str],
    fix: Path | None,
) -> tuple[list[ValidationReport], str | None]:
    """The reports of a recipe's data and of its held-out set; and an error text if stage 2 has no negatives."""
    data = recipe.data
    if fix is not None and data.sources:
        raise typer.BadParameter(
            "a mixture has several files: give each a command of its own", param_hint="--fix"
        )
    held = [] if data.validation_path is None else [data.validation_path]
    every = data.each()
    first = data.looked_at
    if first is not None:
        typer.echo(f"data.streaming: the first {first} rows of {data.path} are checked", err=True)
    reports = [
        _checked(str(own.path), _how(own, how), settings, [*held, *against], fix, first) for own in every
    ]
    trained = list(reports)
    reports += [_checked(source, _how(data, how), settings, (), None) for source in held]
    negatives = recipe.negatives
    made = set(negatives.mix) != {"dataset"} or negatives.on_policy_fraction is not None
    needed = recipe.stage2.enabled and recipe.stage2.build().needs_negatives
    some = any(any(report.negatives_per_prompt.get("all", ())) for report in trained)
    lacking = needed and not made and any(report.examples for report in trained) and not some
    names = ", ".join(str(own.path) for own in every)
    return reports, f"stage 2 has no negative in {names}: {WITHOUT_NEGATIVES}" if lacking else None


def _checked(
    data: str,
    how: Mapping[str, Any],
    settings: ModelSettings | None,
    against: Sequence[str],
    fix: Path | None,
    first: int | None = None,
) -> ValidationReport:
    """The report of a data set, or of its first rows."""
    from cwdpo.data.read.rows import count_rows, first_rows, open_source
    from cwdpo.data.validate.checks import validate as check
    from cwdpo.models.packages import check_packages

    if settings is not None:
        check_packages(settings)
    source = open_source(data, streaming=first is not None)
    rows, name = first or count_rows(source), Path(source.name).name
    source = source if first is None else first_rows(source, first)
    with bars(transient=True) as shown:
        counter = None if settings is None else _token_counter(settings)
        return check(
            source, **how, against=against, fix=fix, lengths=counter,
            progress=lambda done: shown.show(name, done, rows),
        )  # fmt: skip


def _rows_to_show(
    data: str, how: Mapping[str, Any], first: int | None, settings: ModelSettings | None, n: int
) -> list[ShownRow]:
    """The first rows as a checkpoint's processor makes tokens of them.

    Raises:
        typer.BadParameter: there is no checkpoint to make tokens.
    """
    from cwdpo.data.read.reader import read_examples
    from cwdpo.data.read.rows import open_source
    from cwdpo.data.validate.show import shown_rows

    if settings is None:
        raise typer.BadParameter(
            "what a model sees depends on its processor: give a recipe, or a checkpoint by --model",
            param_hint="--show",
        )
    reading = {key: value for key, value in how.items() if key != "max_length"}
    source = open_source(data, streaming=first is not None)
    examples = read_examples(source, **reading, max_bad_fraction=1.0, limit=n).examples
    return list(shown_rows(_encoder(settings, how.get("max_length")), examples))


def _encoder(settings: ModelSettings, max_length: int | None) -> Encoder:
    from cwdpo.data.encode.encoder import Encoder
    from cwdpo.models.load import load_processor_alone

    processor, tokens = load_processor_alone(settings)
    return Encoder(processor, max_length, cache_gb=0, checkpoint=tokens)


def _token_counter(settings: ModelSettings) -> LengthCounter:
    from cwdpo.data.validate.lengths import token_counter
    from cwdpo.models.load import load_processor_alone

    return token_counter(*load_processor_alone(settings))


def sample(
    recipe: Annotated[
        Path, typer.Argument(help="a recipe: its data, negatives.sampler and negatives.judge are used")
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="new .jsonl or .parquet file")] = Path("preferences.jsonl"),
    model: Annotated[
        str | None, typer.Option(help="the policy to sample; default: the recipe's model.path")
    ] = None,
    chosen: Annotated[
        Literal["data", "best"],
        typer.Option(
            help="data: the data's chosen response, against samples that the judge finds wrong; best: the sample with "
            "the judge's highest score, against the one with its lowest"
        ),
    ] = "data",
    base_url: Annotated[
        list[str] | None,
        typer.Option(
            help="sample on this OpenAI-compatible server instead of here; given several times: on all of them together"
        ),
    ] = None,
    engine: Engine = "local",
    actors: Actors = None,
    ray_address: RayAddress = None,
) -> None:
    """Sample a policy for a recipe's prompts and write preference data in TRL's format.

    If the command was killed, start it again: it continues from there. Train on the file with
    `cwdpo train RECIPE --from FILE`, or with TRL, LLaMA-Factory or ms-swift.
    """
    from cwdpo.config import load_recipe
    from cwdpo.onpolicy.on_ray import LOCAL, RayOptions
    from cwdpo.onpolicy.preferences import make_preferences, on_servers

    if engine == "local" and (actors or ray_address):
        raise typer.BadParameter("is for --engine ray", param_hint="--actors" if actors else "--ray-address")
    ray = RayOptions(actors, ray_address or LOCAL) if engine == "ray" else None
    parsed = on_servers(load_recipe(recipe, overrides or ()), base_url or (), model)
    with run_listener() as listener:
        made = make_preferences(parsed, out, model=model, chosen=chosen, listener=listener, ray=ray)
    counts = made.counts
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.dropped.items())) or "none"
    origins = ", ".join(f"{n} {origin}" for origin, n in sorted(counts.by_origin.items()))
    answered = ", ".join(f"{n} by {url}" for url, n in made.answered.items())
    typer.echo(
        f"pairs    {made.path}: {made.rows} ({origins}); {counts.left_out} of {counts.examples} prompts have none\n"
        f"samples  {counts.samples}, of which did not become negatives: {dropped}"
        + (f"\nservers  new answers: {answered}" if answered else "")
    )
