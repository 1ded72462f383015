"""Progress on the terminal: bars that leave no trace where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cwdpo.cli.watch import in_short
from cwdpo.data.problems import printable


def row_bar(name: str, total: int | None) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A bar of rows on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda rows: None, lambda: None
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task(escape(Path(name).name), total=total)
    bar.start()
    return lambda rows: bar.update(task, completed=rows), bar.stop


def run_listener() -> tuple[Any, Callable[[], None]]:
    """Phases, optimizer steps and samples on stderr, on the main process only; each bar with its pace and time left."""
    from cwdpo.stage.listener import Listener

    if os.environ.get("RANK", "0") != "0":
        return Listener(), lambda: None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    bar.start()

    def show(name: str, done: int, total: int, unit: str) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=total, pace="")
        speed = bar.tasks[tasks[name]].speed
        pace = "" if speed is None else f"{speed:.1f} {unit}/s"
        bar.update(tasks[name], completed=done, total=total, pace=pace)

    def read(stage: str, readings: Any) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=None, pace="")
        bar.update(tasks[stage], description=f"{stage} {in_short(readings)}")

    listener = Listener(
        readings=read,
        phase=lambda text: bar.console.print(text, markup=False),
        note=lambda text: bar.console.print(printable(f"note: {text}"), markup=False, highlight=False),
        step=lambda stage, done, total: show(stage, done, total, "steps"),
        sampled=lambda round_, done, total: show(f"samples of round {round_}", done, total, "completions"),
    )
    return listener, bar.stop
