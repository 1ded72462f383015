"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as you like")]
AsJson = Annotated[bool, typer.Option("--json", help="for machines")]
