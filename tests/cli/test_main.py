"""The command line: help, exit codes, and errors without a traceback."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cwdpo.cli import main as cli
from cwdpo.errors import NonFiniteError

Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


# --- help -----------------------------------------------------------------------------------------------


def test_the_commands_are_there() -> None:
    assert {("demo",), ("train",), ("validate",), ("report",), ("init-model",), ("recipe", "schema")} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_every_command(run: Run, path: tuple[str, ...]) -> None:
    done = run(*path, "--help")
    assert done.code == 0
    assert done.err == ""
    text = " ".join(done.out.split())
    assert text.startswith("Usage: ")
    assert " ".join(path) in text.partition(" [")[0]
    # Words in square brackets would be taken for the markup of rich, and vanish.
    assert " ".join(COMMANDS[path].help.split(". ")[0].split()).rstrip(".") in text
    for parameter in COMMANDS[path].params:
        for option in getattr(parameter, "opts", ()):
            assert option.lower() in text.lower(), f"{option} is missing from the help"


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    done = run()
    assert done.code == 2
    text = done.out + done.err
    for first, *_ in COMMANDS:
        assert first in text


@pytest.mark.parametrize(
    "arguments", [("trian",), ("train",), ("init-model", "x", "--width", "wide"), ("validate", "x", "--jsn")]
)
def test_wrong_usage_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.err.startswith("Usage: ")
    assert "Traceback" not in done.err


# --- errors ---------------------------------------------------------------------------------------------


def test_an_error_of_ours_sets_its_own_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def diverge(path: Path) -> None:
        raise NonFiniteError("loss is nan at step 3")

    monkeypatch.setattr("cwdpo.rundir.RunDir.open", diverge)
    assert run("report", tmp_path) == (4, "", "cwdpo: loss is nan at step 3\n")


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cwdpo", "report", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cwdpo: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory (MemoryError)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory (DefaultCPU",
        ),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "raise the limit of open files (ulimit -n)"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: the file cannot be written"),
        (RuntimeError("basic_ios::clear: iostream error"), "a file of the run: the file cannot be written"),
        (Exception("No space left on device (os error 28)"), "a file of the run: the file cannot be written"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), "x: the file cannot be written"),
        (OSError(errno.ENOENT, "No such file or directory", "x"), "x: does not exist and cannot be created"),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("cwdpo.rundir.RunDir.open", fail)
    done = run("report", tmp_path)
    assert done.code == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system where no folder can be made")
@pytest.mark.parametrize("command", ["init-model", "train", "report"])
def test_a_folder_that_cannot_be_made_is_one_line(run: Run, command: str) -> None:
    out = "/proc/none/x"
    arguments = {"train": ("tiny", "--out", out), "init-model": (out,), "report": (out,)}[command]
    done = run(command, *arguments)
    assert done.code == 1
    assert "/proc/none" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_an_interrupt_that_a_compiled_module_turns_into_an_error_is_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def imported(path: Path) -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("cwdpo.rundir.RunDir.open", imported)
    done = run("report", tmp_path)
    assert (done.code, done.err) == (130, "cwdpo: interrupted\n")


def test_an_interrupt_that_falls_into_a_callback_is_not_lost() -> None:
    """Python prints and forgets what a callback of a weak reference raises."""
    code = """
import signal, sys, time, weakref
from cwdpo.cli import main as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored

class Thing: ...

def interrupted(_):
    raise KeyboardInterrupt

@cli.app.command("wait")
def wait():
    thing = Thing()
    kept = weakref.ref(thing, interrupted)
    del thing
    for _ in range(200):
        time.sleep(0.05)
    print("went on")

sys.argv = ["cwdpo", "wait"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("background", [False, True])
def test_an_interrupt_while_the_command_line_is_imported_shows_nothing(background: bool) -> None:
    """Imports take long enough to be interrupted; a shell's job in the background ignores interrupts."""
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if {background} else signal.default_int_handler)
from cwdpo.__main__ import main

class Interrupts:
    def find_spec(self, name, *_):
        if name == "cwdpo.cli.common":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv = ["cwdpo", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0 if background else -signal.SIGINT, "")


def test_an_interrupt_after_the_end_is_not_shown() -> None:
    """The second Ctrl-C may fall into the callbacks of what the ended command has left."""
    code = """
import sys, weakref
from cwdpo.cli import main as cli

class Thing: ...

def interrupted(_):
    raise KeyboardInterrupt

def failed(_):
    raise ValueError("shown")

thing = Thing()
kept = [weakref.ref(thing, interrupted), weakref.ref(thing, failed)]

@cli.app.command("end")
def end():
    raise KeyboardInterrupt

sys.argv = ["cwdpo", "end"]
try:
    cli.main()
finally:
    del thing
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "KeyboardInterrupt" not in done.stderr
    assert "ValueError: shown" in done.stderr
