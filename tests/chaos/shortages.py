"""Too little disk at twenty sizes in every phase, folders that are read-only, 64 open files, 1.5 GB of address space.

A command must end in one line that says so, or go through; once there is enough, it must end as its undisturbed twin.
The disk is a small file system in memory, which only root may mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.commands import PATIENCE, contents, difference, said

if TYPE_CHECKING:
    from chaos.__main__ import Chaos

SIZES = 20
FILES = 64
ADDRESSES = 1_500_000_000
"""Bytes of address space."""
LARGE = "size=512m"


@dataclass(frozen=True)
class Phase:
    """A part of a command's work.

    Attributes:
        name: for the table.
        command: whose work it is.
        begins: number of the copy of a run's folder to start from; ``None``: an empty folder.
        ends: a name in the run whose appearance ends the phase; empty: the command's own end.
    """

    name: str
    command: str
    begins: int | None = None
    ends: str = ""


PHASES = (
    Phase("train, data and stage 1", "train", ends="stage1/model"),
    Phase("train, sampling rounds", "train", begins=1, ends="stage2/checkpoint-4"),
    Phase("train, the end of stage 2", "train", begins=2),
    Phase("train, stage 2 of an adapter", "train-lora", begins=1),
    Phase("sample", "sample"),
    Phase("evaluate", "evaluate"),
    Phase("export", "export"),
    Phase("report", "report"),
    Phase("sweep", "sweep"),
)


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system in memory, for as long as the block.

    Raises:
        PermissionError: it may not be mounted here.
    """
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", LARGE, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PermissionError(f"a small disk needs root and mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        for wait in (0.1, 1.0, 10.0):  # processes that a killed command leaves end a little later
            if subprocess.run(["umount", str(folder)], check=False).returncode == 0:
                break
            time.sleep(wait)
        folder.rmdir()


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system: ``ro``, ``rw,size=4m``."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used(folder: Path) -> int:
    """Bytes in use on a file system."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


class Shortages:
    """The table, on the commands of a prepared harness."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos, self.server = chaos, chaos.server
        self.commands = {c.name: c for c in chaos.commands}
        self.small, self.err = chaos.place / "small", chaos.place / "small.err"
        self.rows: list[tuple[str, int, int, int]] = []

    def all(self, names: Sequence[str] = (), sizes: int = SIZES) -> str:
        """Every phase and every shortage of these commands, by default of all; the table as markdown."""
        phases = [phase for phase in PHASES if not names or phase.command in names]
        for phase in phases:
            self.full_disk(phase, sizes)
        for phase in phases:
            self.other(phase.name, phase, "read-only folder")
            self.other(phase.name, phase, f"{FILES} open files")
        for name in names or self.commands:
            self.small_process(name)
        head = "| what | tries | one line | went through |\n|---|---|---|---|\n"
        return head + "\n".join(f"| {a} | {b} | {c} | {d} |" for a, b, c, d in self.rows)

    def _place(self, phase: Phase, disk_: Path) -> Path:
        """The folder of a command on the disk, as it is when the phase begins."""
        place = disk_ / "case"
        shutil.rmtree(place, ignore_errors=True)
        said(place).unlink(missing_ok=True)
        self.err.unlink(missing_ok=True)
        place.mkdir()
        if phase.begins is not None:
            shutil.copytree(self.chaos.stages[phase.command][phase.begins], place / "run")
        return place

    def _start(self, words: list[object], **limits: int) -> None:
        # What it prints goes elsewhere: it is the command's own files that find no room.
        self.server.start(self.err, *words, out=self.chaos.place / "small.said", limits=limits)

    def full_disk(self, phase: Phase, sizes: int) -> None:
        """A phase with the disk full at so many sizes, from what is there at its beginning to what it needs."""
        with disk(self.small):
            place = self._place(phase, self.small)
            words = self.commands[phase.command].arguments(place)  # makes the copy that a report is of
            first = most = used(self.small)
            self._start(words)
            end = place / "run" / phase.ends

            def look() -> bool:
                nonlocal most
                most = max(most, used(self.small))
                time.sleep(0.005)
                return bool(phase.ends) and end.exists()

            if self.server.follow(look):
                self.server.stop()
            else:
                self.server.wait()
        refused = 0
        for number in range(sizes):
            room = first + int((most - first) * (number + 0.5) / sizes)
            with disk(self.small):
                place = self._place(phase, self.small)
                words = self.commands[phase.command].arguments(place)
                remount(self.small, f"size={room}")
                self._start(words)
                refused += self._one_line(f"{phase.name}, disk of {room} bytes", phase, self.server.wait())
                remount(self.small, LARGE)
                self._ends_well(f"{phase.name}, disk of {room} bytes", phase, place)
        self.rows.append(
            (f"{phase.name}, full disk ({first >> 10} to {most >> 10} KiB)", sizes, refused, sizes - refused)
        )
        print(f"chaos: {self.rows[-1]}", flush=True)

    def other(self, name: str, phase: Phase, what: str) -> None:
        """A phase in a read-only folder, or with few open files."""
        with disk(self.small):
            place = self._place(phase, self.small)
            words = self.commands[phase.command].arguments(place)  # makes the copy that a report is of
            if what == "read-only folder":
                remount(self.small, "ro")
                self.server.start(self.err, *words)
            else:
                self.server.start(self.err, *words, limits={"RLIMIT_NOFILE": FILES})
            refused = self._one_line(f"{name}, {what}", phase, self.server.wait())
            remount(self.small, "rw")
            self._ends_well(f"{name}, {what}", phase, place)
        self.rows.append((f"{name}, {what}", 1, refused, 1 - refused))
        print(f"chaos: {self.rows[-1]}", flush=True)

    def small_process(self, name: str) -> None:
        """A command in a process of its own with little address space, which must hold its imports too."""
        command = self.commands[name]
        place = self.chaos.place / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        words = [str(word) for word in command.arguments(place)]
        limit = f'ulimit -v {ADDRESSES // 1024}; exec "$@"'
        begun = time.monotonic()
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                ["bash", "-c", limit, "bash", sys.executable, "-m", "cwdpo", *words], stdout=subprocess.DEVNULL,
                stderr=err, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            while process.poll() is None and time.monotonic() < begun + self.server.limit:
                time.sleep(0.1)
                if command.end and time.monotonic() > begun + PATIENCE / 2:
                    process.terminate()
            with suppress(ProcessLookupError):
                process.kill()
            code = process.wait()
            err.seek(0)
            self.err.write_bytes(err.read())
        ended = command.end is not None and code < 0
        refused = (
            self._judged(f"{name}, {ADDRESSES} bytes of address space", code, (0, *command.codes))
            and not ended
        )
        self.rows.append((f"{name}, 1.5 GB of address space", 1, int(refused), int(not refused)))
        print(f"chaos: {self.rows[-1]}", flush=True)

    def _one_line(self, case: str, phase: Phase, code: int) -> int:
        return int(self._judged(case, code, self.commands[phase.command].codes))

    def _judged(self, case: str, code: int, codes: tuple[int, ...]) -> bool:
        """Whether a command refused; note it where it was not in one line."""
        self.chaos.figures.count("shortages of the table")
        text = self.err.read_text(errors="replace") if self.err.is_file() else ""
        lines = [line for line in text.splitlines() if line.startswith("cwdpo: ")]
        if "Traceback" in text or (code not in codes and code >= 0 and len(lines) != 1):
            self.chaos.figures.fail("tracebacks", case, f"exit code {code}: {text}")
        return code not in codes

    def _ends_well(self, case: str, phase: Phase, place: Path) -> None:
        command = self.commands[phase.command]
        self.err.unlink(missing_ok=True)
        code = command.codes[0]
        if not self.chaos.has_ended(command, place):
            self.server.start(self.err, *command.arguments(place), out=said(place))
            code = self.server.wait()
        if code not in command.codes:
            self.chaos.figures.fail("wrong continuations", case, f"exit code {code}: {self.err.read_text()}")
            return
        found = command.result(place)
        if phase.begins is not None:
            found = contents(place / "run", self.chaos.stages[phase.command][0])
        if wrong := difference(found, command.wanted):
            self.chaos.figures.fail("wrong continuations", case, f"differs from its twin: {wrong}")
