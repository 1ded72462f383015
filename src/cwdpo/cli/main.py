"""The command line: its commands are mounted here, and errors are answered in words. Help and schema load no torch."""

from __future__ import annotations

import errno
import io
import os
import re
import sys

import typer

from cwdpo.cli import data, evaluate, lab, train, watch
from cwdpo.data.problems import printable
from cwdpo.errors import CwdpoError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Cooling-Weighted DPO for vision-language models.",
)
for group in (train, data, evaluate, watch, lab):
    group.mount(app)

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip


def _disk_trouble(error: Exception) -> str | None:
    """What a full, read-only or broken disk did, in our words; ``None`` for any other error.

    safetensors and torch raise errors of their own, which only their text tells apart.
    """
    text, place = str(error), "a file of the run"
    found = re.search(r"\(os error (\d+)\)", text) if type(error).__name__ == "SafetensorError" else None
    number = int(found[1]) if found else getattr(error, "errno", None)
    if isinstance(error, RuntimeError) and re.search(r"inline_container|PytorchStreamWriter", text):
        number = errno.ENOSPC
    if number not in _DISK_ERRORS:
        return None
    if isinstance(error, OSError) and error.filename:
        place = str(error.filename)
    remedy = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "choose a place that you may write to"
    return (
        f"{place}: the disk refuses ({os.strerror(number)}); what was written before is whole: {remedy}, then "
        "continue with --resume, or choose another --out"
    )


def main() -> None:
    """Entry point: errors that cwdpo raises on purpose, and those of a disk, are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):  # paths may hold bytes that are no text in any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except CwdpoError as error:
        typer.echo(f"cwdpo: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        trouble = _disk_trouble(error)
        if trouble is None:
            raise
        typer.echo(f"cwdpo: {printable(trouble)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
