"""JSON, YAML and text of others, read with limits of size and depth; every failure is one line with the file's name.

A deep or a very large file would otherwise end in a traceback or not at all, and a few lines of YAML can stand for
gigabytes (an alias that names aliases).
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
"""Of a JSON file, of a row of JSONL, and of a text file."""
DEEPEST = 60
"""Lists and mappings inside each other."""

_LONG_NUMBER = re.compile(rb"[0-9]{301}")


def open_file(path: Path) -> BinaryIO:
    """A file to read; a pipe or a device, which could keep the reader waiting for ever, is refused.

    Raises:
        FileError: it cannot be opened, or is no regular file.
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
    """The whole of a file.

    Raises:
        FileError: it cannot be read, is no file, or holds more than ``most`` bytes.
    """
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileError(f"{path}: has more than {most} bytes, the most that is read here")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The whole of a text file in UTF-8, a byte order mark left out.

    Raises:
        FileError: as :func:`read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: cannot be read as text ({error})") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON value, at most :data:`DEEPEST` deep.

    Args:
        where: the file, for messages.

    Raises:
        FileError: it is not JSON, or too deep.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: is not JSON ({_short(error)})") from None
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    if _LONG_NUMBER.search(data):  # as a float it would be infinite
        raise FileError(f"{where}: holds a number of more than 300 digits")
    # Fewer brackets than that cannot be deeper; most files need no walk.
    if data.count(b"[") + data.count(b"{") > DEEPEST and is_deep(value):
        raise FileError(f"{where}: is nested deeper than {DEEPEST}")
    return value


def is_deep(value: Any, limit: int = DEEPEST) -> bool:
    """Whether lists and mappings stand inside each other more than ``limit`` times."""
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
        FileError: as :func:`read_bytes` and :func:`parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        FileError: as :func:`read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds a JSON {_json_kind(value)} where an object belongs")
    return value


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a last line cut off by a kill is left out; no file is no rows.

    Raises:
        FileError: a line that ends in a line feed is not a JSON object, or is too long or too deep.
    """
    if not os.path.isfile(path):
        return
    with open_file(path) as file:
        number = 0
        # Only a line feed ends a row: text of a model may hold every other line break.
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
    """All rows of :func:`iter_jsonl`.

    Raises:
        FileError: as there.
    """
    return list(iter_jsonl(path))


def ends_whole(path: Path) -> bool:
    """Whether a JSONL file is absent, empty, or ends in a line feed: then a row can be appended."""
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
