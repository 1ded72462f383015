"""The command line: adds all commands, and prints errors without a traceback. Help and schema do not load torch."""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any, NoReturn

import typer

from cwdpo.cli import data, env, evaluate, init, lab, plan, train, watch
from cwdpo.data.problems import printable
from cwdpo.errors import CwdpoError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Cooling-Weighted DPO for vision-language models.",
)
for group in (init, train, plan, data, watch, evaluate, lab, env):
    group.mount(app)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda asked: _show_version(asked), help="show it"),
    ] = False,
) -> None:
    del version


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cwdpo {metadata.version('cwdpo')}")
        raise typer.Exit


_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EBUSY,
    errno.ESTALE, errno.ENXIO,
}  # fmt: skip


_OF_RUST = ("SafetensorError", "Exception")
"""Types of errors of safetensors, and of tokenizers, which uses the base class itself."""
_NO_MEMORY = "can't allocate memory|failed to map segment|can't start new thread"
"""Of torch's allocator, of the loader of a library, and of a thread's stack."""


def _machine_trouble(error: Exception) -> str | None:
    """A message for an error of the disk or of too little memory; ``None`` for any other error.

    safetensors, tokenizers and torch raise their own types of errors, which can be recognised only by their text.
    """
    text, place = str(error), "a file of the run"
    found = re.search(r"\(os error (\d+)\)", text) if type(error).__name__ in _OF_RUST else None
    number = int(found[1]) if found else getattr(error, "errno", None)
    if isinstance(error, RuntimeError) and re.search(
        r"inline_container|PytorchStreamWriter|iostream error", text
    ):
        number = errno.ENOSPC
    if isinstance(error, MemoryError) or number == errno.ENOMEM or re.search(_NO_MEMORY, text):
        return (
            f"there is not enough memory ({' '.join(text.split())[:200] or 'MemoryError'}); files written before are "
            "complete: lower train.batch_size or data.cache_gb, or take a larger machine, then continue with --resume"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{text}: raise the limit of open files (ulimit -n), then continue with --resume"
    if isinstance(error, OSError) and error.filename:
        place = str(error.filename)
    if isinstance(error, FileNotFoundError) and error.filename:
        return (
            f"{place}: does not exist and cannot be created there, or was removed while the command ran; files written "
            "before are complete: choose another --out, or put back what was removed and continue with --resume"
        )
    if number not in _DISK_ERRORS:
        return None
    remedy = (
        "free some space"
        if number in (errno.ENOSPC, errno.EDQUOT)
        else "choose a folder that you may write to"
    )
    return (
        f"{place}: the file cannot be written ({os.strerror(number)}); files written before are complete: {remedy}, "
        "then continue with --resume, or choose another --out"
    )


def main() -> None:
    """Entry point; prints errors of cwdpo and of the disk without a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a path may contain bytes that are not valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # peft reads transformers' old name whenever it makes an adapter; a user can do nothing about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_once_more
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:  # outside a command, or a second one while the first is answered
        _say_interrupted()
    except CwdpoError as error:
        typer.echo(f"cwdpo: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            _say_interrupted()  # compiled modules turn one that falls into their import into an ImportError
        trouble = _machine_trouble(error)
        if trouble is None:
            raise
        typer.echo(f"cwdpo: {printable(trouble)}", err=True)
        sys.exit(1)
    finally:
        sys.unraisablehook = hook if isinstance(hook, _AtTheEnd) else _AtTheEnd(hook)


def _say_interrupted() -> NoReturn:
    with contextlib.suppress(KeyboardInterrupt):
        typer.echo("cwdpo: interrupted", err=True)
    sys.exit(130)


class _AtTheEnd:
    """Does not show an interrupt that falls into a callback after the command has ended: the process ends anyway."""

    def __init__(self, otherwise: Callable[[Any], object]) -> None:
        self._otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._otherwise(unraisable)


def _interrupt_once_more(unraisable: Any) -> None:
    """Python ignores an exception in a callback of a weak reference: an interrupt that falls there would be lost."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        main = threading.get_ident()
        threading.Thread(target=_interrupt_outside, args=(main,), daemon=True).start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_outside(main: int) -> None:
    """Interrupt the main thread once it has left the hook: an interrupt that falls into the hook is lost, too."""
    here = _interrupt_once_more.__code__
    while any(frame.f_code is here for frame, _ in traceback.walk_stack(sys._current_frames().get(main))):
        time.sleep(0.005)
    _thread.interrupt_main()


if __name__ == "__main__":
    main()
