"""Arguments and options that several commands have, and the groups of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="a recipe (YAML), or the name of one of the package")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value; any number of them")]
Code = Annotated[
    list[str] | None,
    typer.Option(
        help="code of the model that may run: a file that registers its classes (model.code), or 'remote' for the "
        "checkpoint's own; of a run, only what its recipe names"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

# Groups of commands in the help, in the order in which their first commands are added.
TRAIN, DATA, UNDERSTAND, EVALUATE = "Train", "Data", "Understand a run", "Evaluate and export"
EVIDENCE, TOOLS = "Studies and benchmarks", "Tools"
