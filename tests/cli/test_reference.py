"""docs/reference/commands.md is what the commands say of themselves."""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click

from cwdpo.cli.main import app
from paths import ROOT

PAGE = ROOT / "docs" / "reference" / "commands.md"
BEGIN = "<!-- written by tests/cli/test_reference.py -->\n"


def commands() -> str:
    group = typer.main.get_command(app)
    whole = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="cwdpo"), name="cwdpo")
    # From the first command on, one heading lower, and links as the site writes them.
    return "\n".join(line.rstrip() for line in whole[whole.index("## `cwdpo ") :].splitlines()) + "\n"


def test_the_page_of_commands_is_current() -> None:
    before, _, written = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if written.strip() != commands().strip():
        PAGE.write_text(f"{before}{BEGIN}\n{commands()}", encoding="utf-8")
        raise AssertionError("docs/reference/commands.md was not current: it is written anew; commit it")
