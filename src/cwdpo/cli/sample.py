"""``cwdpo sample``: a policy's own responses as preference data for this and other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cwdpo.cli.progress import run_listener


def sample(
    recipe: Annotated[
        Path, typer.Argument(help="a recipe: its data, negatives.sampler and negatives.judge count")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as often as you like")
    ] = None,
    out: Annotated[Path, typer.Option(help="new .jsonl or .parquet file")] = Path("preferences.jsonl"),
    model: Annotated[
        str | None, typer.Option(help="the policy to sample; default: the recipe's model.path")
    ] = None,
) -> None:
    """Sample a policy for a recipe's prompts and write preference data in TRL's format.

    Started again after a kill it goes on where it was. Train on the file by `cwdpo train RECIPE --from FILE`, or with
    TRL, LLaMA-Factory or ms-swift.
    """
    from cwdpo.config import load_recipe
    from cwdpo.onpolicy.preferences import make_preferences

    parsed = load_recipe(recipe, overrides or ())
    listener, stop = run_listener()
    try:
        made = make_preferences(parsed, out, model=model, listener=listener)
    finally:
        stop()
    counts = made.counts
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.dropped.items())) or "none"
    origins = ", ".join(f"{n} {origin}" for origin, n in sorted(counts.by_origin.items()))
    typer.echo(
        f"pairs    {made.path}: {made.rows} ({origins}); {counts.left_out} of {counts.examples} prompts have none\n"
        f"samples  {counts.samples}, of which no negatives: {dropped}"
    )
