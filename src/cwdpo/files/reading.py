"""Reads JSON and text files with limits of size and depth; every error is one line with the file's name.

Without the limits, a very deep or very large file ends in a traceback, or fills the memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cwdpo.errors import FileError

MOST_BYTES = 2**26
"""Largest size of a JSON file, of a row of JSONL, and of a text file."""
DEEPEST = 60
"""Largest depth of nested lists and mappings."""

_LONG_NUMBER = re.compile(rb"[0-9]{301}")


def open_file(path: Path) -> BinaryIO:
    """Open a file to read. Pipes and devices are refused, because reading them might never end.

    Raises:
        FileError: it cannot be opened, or is not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError(f"{path}: is not a file")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All bytes of a file.

    Raises:
        FileError: it cannot be read, is not a file, or has more than ``most`` bytes.
    """
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileError(f"{path}: has more than {most} bytes, which is the limit")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        FileError: see :func:`read_bytes`; or the file is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: cannot be read as text ({error})") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse a JSON value.

    Args:
        text: JSON.
        where: name of the file, for messages.

    Raises:
        FileError: it is not JSON, or nested deeper than :data:`DEEPEST`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: is not JSON ({_short(error)})") from None
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    if _LONG_NUMBER.search(data):  # as a float it would be infinite
        raise FileError(f"{where}: contains a number of more than 300 digits")
    # With fewer brackets than the limit it cannot be deeper: most files need no full check.
    if data.count(b"[") + data.count(b"{") > DEEPEST and is_deep(value):
        raise FileError(f"{where}: is nested deeper than {DEEPEST}")
    return value


def is_deep(value: Any, limit: int = DEEPEST) -> bool:
    """Whether lists and mappings are nested more than ``limit`` levels deep."""
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for node in level
            if isinstance(node, list | dict)
            for inner in (node.values() if isinstance(node, dict) else node)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileError: see :func:`read_bytes` and :func:`parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileError: see :func:`read_json`; or the value is not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds a JSON {_json_kind(value)} where an object belongs")
    return value


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. An incomplete last line (after a kill) is left out; a missing file has no rows.

    Raises:
        FileError: a complete line is not a JSON object, or is too long or too deep.
    """
    if not os.path.isfile(path):
        return
    with open_file(path) as file:
        number = 0
        # Only a line feed ends a row: a model's text may contain any other line break.
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > MOST_BYTES:
                raise FileError(f"{where}: has more than {MOST_BYTES} bytes")
            if not line.endswith(b"\n"):
                with contextlib.suppress(FileError):
                    value = parse_json(line, where)
                    if isinstance(value, dict):
                        yield value
                return
            value = parse_json(line[:-1], where)
            if not isinstance(value, dict):
                raise FileError(f"{where}: holds a JSON {_json_kind(value)} where an object belongs")
            yield value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file as a list.

    Raises:
        FileError: see :func:`iter_jsonl`.
    """
    return list(iter_jsonl(path))


def ends_whole(path: Path) -> bool:
    """Whether a row can be appended to a JSONL file: it is absent, empty, or ends in a line feed."""
    if not path.is_file() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _json_kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
