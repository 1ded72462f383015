"""Runs the pages of docs/tutorials as a reader would: files are written, commands run, the shown output compared.

    python tests/tutorials.py docs/tutorials/PAGE.md      runs a page, prints what its commands print, and brings the
                                                          numbers of the shown lines up to date

A block with ``title="NAME"`` is a file. In a ``console`` block a line ``$ COMMAND`` is run, and the lines below it must
be among its output, in this order; numbers may differ, and ``...`` stands for any lines. ``# exit code N`` behind a
command is the code that it must end with (0 if it is not said). A command that ends with ``&`` runs until the page
ends; it is waited for until its last shown line is there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
_BLOCK = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<body>.*?)^```$', re.M | re.S)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")
_EXIT = re.compile(r"\s*# exit code (\d+)$")
LIMIT = 600
"""Seconds for a command."""


@dataclass
class Command:
    """A command of a page, the lines that the page shows below it, and the code that it must end with."""

    text: str
    shown: list[str] = field(default_factory=list)
    code: int = 0


def steps(page: str) -> list[tuple[str, str] | Command]:
    """What a page does: files ``(name, content)`` and commands, in order."""
    found: list[tuple[str, str] | Command] = []
    for block in _BLOCK.finditer(page):
        if block["title"]:
            found.append((block["title"], block["body"]))
        elif block["kind"] == "console":
            commands: list[Command] = []
            for line in block["body"].splitlines():
                if line.startswith("$ "):
                    code = _EXIT.search(line)
                    text = _EXIT.sub("", line[2:])
                    commands.append(Command(text, code=int(code[1]) if code else 0))
                else:
                    commands[-1].shown.append(line)
            found += commands
    return found


def same(shown: str, printed: str) -> bool:
    """Whether two lines are equal but for numbers and spaces."""
    return _plain(shown) == _plain(printed)


def _plain(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def missing(command: Command, output: str) -> str | None:
    """The first shown line that the output does not have in its place."""
    lines = iter(output.splitlines())
    wanted = (line for line in command.shown if line.strip() not in ("", "..."))
    return next((line for line in wanted if not any(same(line, printed) for printed in lines)), None)


def environment() -> dict[str, str]:
    """Of a reader in a terminal of 110 columns, with the command line of this environment, and without network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    mine = {"PATH": path, "COLUMNS": "110", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **mine, "OPENAI_API_KEY": "none"}


class Reader:
    """Follows a page in a folder; used as a context, because a page may start a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()
            server.communicate(timeout=60)

    def write(self, name: str, content: str) -> None:
        """A file of the page."""
        (self.folder / name).write_text(content, encoding="utf-8")

    def run(self, command: Command) -> tuple[int, str]:
        """The exit code and the output of a command."""
        if command.text.endswith("&"):
            return self._start(command)
        done = subprocess.run(
            command.text, shell=True, cwd=self.folder, env=environment(), text=True, timeout=LIMIT, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout

    def _start(self, command: Command) -> tuple[int, str]:
        text = f"exec {command.text[:-1]}"
        server = subprocess.Popen(
            text, shell=True, cwd=self.folder, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._servers.append(server)
        said = ""
        for line in server.stdout or ():
            said += line
            if same(line, command.shown[-1]):
                break
        return 0, said


def updated(page: str, command: Command, output: str) -> str:
    """The page with the numbers of a command's shown lines as they were printed now."""
    lines = iter(output.splitlines())
    for shown in command.shown:
        new = next((line for line in lines if same(shown, line)), None) if shown.strip(". ") else None
        if new is not None:
            page = page.replace(f"\n{shown}\n", f"\n{new.rstrip()}\n", 1)
    return page


def main(path: Path) -> None:
    """Run a page, print the output, and write the page again."""
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, Reader(Path(folder)) as reader:
        for step in steps(page):
            if isinstance(step, tuple):
                reader.write(*step)
                continue
            code, output = reader.run(step)
            print(f"$ {step.text}    [{code}]\n{output}", flush=True)
            if code != step.code or (lacking := missing(step, output)) is not None:
                print(
                    f"!!! exit code {code}, not {step.code}"
                    if code != step.code
                    else f"!!! not there: {lacking}"
                )
            page = updated(page, step, output)
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
