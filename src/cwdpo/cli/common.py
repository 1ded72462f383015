"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML), or the name of one of the package")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value; any number of them")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
