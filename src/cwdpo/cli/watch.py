"""``cwdpo diagnose`` and ``cwdpo watch``, for a run during training and afterwards. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cwdpo.cli.common import UNDERSTAND

FINDINGS = 3
"""Exit code of a diagnosis with findings."""


SHORT = (("delta_logp/chosen", "Δchosen"), ("margin", "margin"), ("kl", "KL"), ("cooling/cooled", "cooled"))
"""Readings shown next to the progress bar: in nats per token, nats, nats per token, and a share."""


def in_short(readings: Mapping[str, Any]) -> str:
    """The latest readings on one line; readings without a value are left out.

    Args:
        readings: by name, objects with ``value``.
    """
    known = [(label, readings[name].value) for name, label in SHORT if name in readings]
    return "  ".join(f"{label} {value:+.3f}" for label, value in known if value is not None)


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (diagnose, watch, report):
        app.command(rich_help_panel=UNDERSTAND)(command)


def diagnose(
    run: Annotated[Path, typer.Argument(help="a run folder, finished or not")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what is wrong with a run and what to change; exit code 0: no findings, 3: findings."""
    from cwdpo.dynamics.diagnose import diagnose as look
    from cwdpo.dynamics.diagnose import to_json
    from cwdpo.rundir import RunDir

    folder = RunDir.open(run)
    findings = look(folder)
    if as_json:
        typer.echo(json.dumps(to_json(findings), indent=1, ensure_ascii=False))
    elif not findings:
        rows = folder.readings()
        where = f"{len(rows)} readings up to step {max((r['step'] for r in rows), default=0)}"
        typer.echo(f"{run}: healthy ({where})" if rows else f"{run}: there are no readings yet")
    for finding in findings if not as_json else ():
        typer.echo(
            f"{finding.severity}: {finding.name}: {finding.title} ({finding.stage}, from step {finding.first_step})"
        )
        for line in finding.evidence:
            typer.echo(f"  seen    {line}")
        typer.echo(f"  change  {finding.advice}\n  source  {finding.source}")
    if findings:
        raise typer.Exit(FINDINGS)


def watch(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port; 0: any free port")] = 8765,
    every: Annotated[int, typer.Option(min=1, help="seconds between two reloads of the page")] = 5,
) -> None:
    """Show a run on a local page that reloads itself. The run is only read; other machines have no access."""
    from cwdpo.report.watch import serve
    from cwdpo.rundir import RunDir

    RunDir.open(run)
    with serve(run, port, every) as server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")


def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html of a run folder again."""
    from cwdpo.report.render import write_report
    from cwdpo.rundir import RunDir

    RunDir.open(run)
    typer.echo(write_report(run))
