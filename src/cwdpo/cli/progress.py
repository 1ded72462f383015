"""Progress bars on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cwdpo.cli.watch import in_short
from cwdpo.data.problems import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from cwdpo.lab.grid import CellResult, OnEvent, Tick
    from cwdpo.lab.progress import Progress as StudyProgress
    from cwdpo.stage.listener import Listener


class Bars:
    """Progress bars by name; a bar is added when its name is first used. Without a ``progress`` nothing is shown."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lines: dict[str, Any] = {}

    def show(self, name: str, done: int, total: int | None, unit: str = "") -> None:
        """Set the count of a bar; with a ``unit`` also show its speed."""
        if self._progress is None:
            return
        line = self._line(name, total)
        speed = self._progress.tasks[line].speed if unit else None
        pace = "" if speed is None else f"{speed:.1f} {unit}/s"
        self._progress.update(line, completed=done, total=total, pace=pace)

    def describe(self, name: str, text: str) -> None:
        """Set the text of a bar."""
        if self._progress is not None:
            self._progress.update(self._line(name, None), description=text)

    def say(self, text: str) -> None:
        """Print a line of text above the bars; a log file has it as one line, however long it is."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, soft_wrap=True)

    def _line(self, name: str, total: int | None) -> Any:
        if name not in self._lines:
            assert self._progress is not None
            self._lines[name] = self._progress.add_task(name, total=total, pace="")
        return self._lines[name]


@contextmanager
def bars(*, always: bool = False, transient: bool = False) -> Iterator[Bars]:
    """Progress bars with count, speed and remaining time.

    Args:
        always: print the last state even if stderr is not a terminal.
        transient: remove the bars at the end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (always or console.is_terminal):
        yield Bars(None)
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=transient) as progress:
        yield Bars(progress)


@contextmanager
def run_listener() -> Iterator[Listener]:
    """A listener that shows phases, optimizer steps and samples of a run; on the main process only."""
    from cwdpo.stage.listener import Listener

    if os.environ.get("RANK", "0") != "0":
        yield Listener(note=lambda text: None)
        return
    taken: dict[str, int] = {}
    with bars(always=True) as shown:

        def step(stage: str, done: int, total: int) -> None:
            taken[stage] = done
            shown.show(stage, done, total, "steps")

        yield Listener(
            # Lines of their own: in a bar they would hide count and remaining time, and a log file would not have them.
            readings=lambda stage, found: shown.say(f"{stage} step {taken.get(stage, 0)}: {in_short(found)}"),
            phase=shown.say,
            note=lambda text: shown.say(printable(f"note: {text}")),
            step=step,
            sampled=lambda round_, done, total: shown.show(f"samples of round {round_}", done, total, "completions"),
        )  # fmt: skip


@contextmanager
def grid_bar(progress: StudyProgress) -> Iterator[OnEvent]:
    """One bar for all cells of a study, with counts and the time left; without a terminal, a line per finished cell."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from cwdpo.lab.grid import CellResult

    console = Console(stderr=True)
    live = console.is_terminal
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TextColumn("{task.fields[count]}"),
    )
    bar = Progress(*columns, console=console, disable=not live)
    line = bar.add_task("", total=max(1, progress.total), count="")

    def note(event: Tick | CellResult) -> None:
        runs = f"{progress.finished}/{progress.cells} runs"
        left = f", {progress.left}" if progress.left else ""
        count = f"{progress.done}/{progress.total} steps{left}"
        bar.update(line, description=runs, completed=progress.done, count=count)
        if isinstance(event, CellResult) and (event.status == "failed" or not live):
            word = "done" if event.status == "done" else f"FAILED: {event.error}"
            text = f"{event.key}: {word} ({event.seconds:.0f} s)"
            console.print(
                text if live else f"{runs}{left}: {text}", markup=False, highlight=False, soft_wrap=True
            )

    with bar:
        yield note
