"""``cwdpo validate`` and ``cwdpo sample``: what a data set holds, and a policy's own responses as a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cwdpo.cli.common import AsJson, Overrides
from cwdpo.cli.progress import bars, run_listener
from cwdpo.data.read.dataset_info import NAME
from cwdpo.errors import RecipeError
from cwdpo.negatives.settings import WITHOUT_NEGATIVES

if TYPE_CHECKING:
    from cwdpo.data.validate.lengths import LengthCounter
    from cwdpo.data.validate.report import ValidationReport
    from cwdpo.models.settings import ModelSettings


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(validate)
    app.command()(sample)


def validate(
    data: Annotated[
        str, typer.Argument(help="a file, a folder, a hub id, or a recipe (.yaml) whose data and model count")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
    data_format: Annotated[
        str | None, typer.Option("--format", help="auto, the name of a format, or file.py:ClassName")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="a column that counts as absent, as often as you like")
    ] = None,
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
    says by itself what is read, how, and by whose tokens it is counted, and its held-out set is checked too; options
    win over it. All rows are read, whatever data.limit says.
    """
    from cwdpo.models.settings import ModelSettings

    given: dict[str, Any] = {
        "format": data_format, "image_root": image_root, "max_length": max_length, "ignore_columns": ignore,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    settings = None if model is None else ModelSettings(path=model)
    if NAME not in data and Path(data).suffix.lower() in (".yaml", ".yml"):
        reports, lacking = _of_recipe(Path(data), overrides or (), given, settings, against or (), fix)
    elif overrides:
        raise typer.BadParameter(
            f"{overrides[0]!r} belongs to a recipe; {data!r} is none", param_hint="OVERRIDES"
        )
    else:
        reports, lacking = [_checked(data, given, settings, against or (), fix)], None
    for report in reports:
        typer.echo(report.to_json() if as_json else report.to_text())
    if lacking:
        raise RecipeError(f"{data}: {lacking}")
    if any(report.problems for report in reports):
        raise typer.Exit(1)


def _of_recipe(
    path: Path,
    overrides: Sequence[str],
    given: Mapping[str, Any],
    settings: ModelSettings | None,
    against: Sequence[str],
    fix: Path | None,
) -> tuple[list[ValidationReport], str | None]:
    """Reports of a recipe's data and of its held-out set, and what stage 2 lacks.

    Raises:
        RecipeError: nothing to validate.
    """
    from cwdpo.config import load_recipe

    recipe = load_recipe(path, overrides)
    data = recipe.data
    if data.path is None:
        raise RecipeError(f"{path}: data.world is drawn by cwdpo itself; only data.path can be validated")
    how: dict[str, Any] = {
        "format": data.format, "default_prompt": data.default_prompt, "captions_per_image": data.captions_per_image,
        "max_length": data.max_length, "ignore_columns": data.ignore_columns,
        "image_root": None if data.image_root is None else Path(data.image_root),
        **given,
    }  # fmt: skip
    if settings is None and recipe.model.path != "init":  # that is made later, tokenizer and all
        settings = recipe.model
    held = [] if data.validation_path is None else [data.validation_path]
    reports = [_checked(data.path, how, settings, [*held, *against], fix)]
    reports += [_checked(source, how, settings, (), None) for source in held]
    negatives = recipe.negatives
    made = set(negatives.mix) != {"dataset"} or negatives.on_policy_fraction is not None
    needed = recipe.stage2.enabled and recipe.stage2.build().needs_negatives
    some = any(reports[0].negatives_per_prompt.get("all", ()))
    lacking = needed and not made and reports[0].examples and not some
    return reports, f"stage 2 has no negative in {data.path}: {WITHOUT_NEGATIVES}" if lacking else None


def _checked(
    data: str,
    how: Mapping[str, Any],
    settings: ModelSettings | None,
    against: Sequence[str],
    fix: Path | None,
) -> ValidationReport:
    from cwdpo.data.read.rows import count_rows, open_source
    from cwdpo.data.validate.checks import validate as check

    source = open_source(data)
    rows, name = count_rows(source), Path(source.name).name
    with bars(transient=True) as shown:
        counter = None if settings is None else _token_counter(settings)
        return check(
            source, **how, against=against, fix=fix, lengths=counter,
            progress=lambda done: shown.show(name, done, rows),
        )  # fmt: skip


def _token_counter(settings: ModelSettings) -> LengthCounter:
    from cwdpo.data.validate.lengths import token_counter
    from cwdpo.models.checkpoint import check_folder
    from cwdpo.models.load import EMBEDDED, load_processor, read_checkpoint_tokens

    source = str(EMBEDDED) if settings.path == "embedded" else settings.path
    check_folder(source)
    return token_counter(load_processor(source, settings), read_checkpoint_tokens(source, settings))


def sample(
    recipe: Annotated[
        Path, typer.Argument(help="a recipe: its data, negatives.sampler and negatives.judge count")
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="new .jsonl or .parquet file")] = Path("preferences.jsonl"),
    model: Annotated[
        str | None, typer.Option(help="the policy to sample; default: the recipe's model.path")
    ] = None,
) -> None:
    """Sample a policy for a recipe's prompts and write preference data in TRL's format.

    Started again after a kill it continues where it was. Train on the file by `cwdpo train RECIPE --from FILE`, or with
    TRL, LLaMA-Factory or ms-swift.
    """
    from cwdpo.config import load_recipe
    from cwdpo.onpolicy.preferences import make_preferences

    parsed = load_recipe(recipe, overrides or ())
    with run_listener() as listener:
        made = make_preferences(parsed, out, model=model, listener=listener)
    counts = made.counts
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.dropped.items())) or "none"
    origins = ", ".join(f"{n} {origin}" for origin, n in sorted(counts.by_origin.items()))
    typer.echo(
        f"pairs    {made.path}: {made.rows} ({origins}); {counts.left_out} of {counts.examples} prompts have none\n"
        f"samples  {counts.samples}, of which no negatives: {dropped}"
    )
