"""Writes files and folders atomically: under a temporary name, which is renamed at the end.

A temporary name is ``.NAME.<16 random hex digits>.tmp`` in the same folder. It is created with ``O_EXCL``, so an
existing link of that name is neither followed nor overwritten. After a kill a temporary file may remain;
:func:`clear_pieces` removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from cwdpo.errors import FileError

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
"""Does not exist on Windows, where few users have the right to make links."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_ENDING = len(".0123456789abcdef.tmp")
_BYTES = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def temporary_name(path: Path) -> Path:
    """An unused name in the same folder as ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new empty file with a temporary name; it is renamed to ``path`` when the block ends without an error.

    The file is synced to disk before it is renamed, unless it need not be ``durable``. After an error it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BYTES, 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: after a kill, there is the complete old file or the complete new one.

    Single surrogates (a command's argument or a column's name may contain some) are written as ``\\udce4``.
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with :func:`write_text`; NaN raises ValueError, because other JSON readers refuse it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def open_to_append(path: Path) -> TextIO:
    """Open a text file to append to; it is created if it does not exist. Links are not followed.

    Raises:
        FileError: the name is a link.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_FOLLOW | _BYTES, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(_link(path)) from None
        raise
    return os.fdopen(handle, "a+", encoding="utf-8", errors="backslashreplace")


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything in it to disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            sync(path)
        else:
            _sync_names(path)


def _sync_names(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        sync(folder)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder with a temporary name; it is renamed to ``folder`` when the block ends without an error.

    Everything in it is synced to disk before it is renamed. After an error it is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Rename a finished folder to its final name, replacing an older one.

    A folder cannot be replaced in one step, so the old one is first renamed to ``.NAME.old``. After a kill between the
    two renames, :func:`clear_pieces` gives it its name back.
    """
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    _sync_names(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder; it is renamed first, so that a kill leaves no incomplete folder with this name."""
    aside = temporary_name(folder)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_pieces(folder: Path) -> None:
    """Remove what a kill left of unfinished writing in a folder; a whole old folder gets its name back."""
    for piece in folder.glob(".*.tmp"):
        shutil.rmtree(piece) if piece.is_dir() and not piece.is_symlink() else piece.unlink()
    for old in folder.glob(".*.old"):
        named = old.with_name(old.name[1:].removesuffix(".old"))
        shutil.rmtree(old) if named.exists() else os.rename(old, named)


def clear_unfinished(path: Path) -> bool:
    """Remove what killed writings of one file or folder left next to it under temporary names.

    Returns:
        Whether there was anything.
    """
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    pieces = [piece for piece in beside if _is_temporary(piece.name, path.name)]
    for piece in pieces:
        shutil.rmtree(piece) if piece.is_dir() and not piece.is_symlink() else piece.unlink()
    return bool(pieces)


def unfinished_in(folder: Path) -> set[str]:
    """The names in a folder of which killed writings left something: one listing, where many names are written."""
    names = os.listdir(folder) if folder.is_dir() else ()
    return {name[1:-_ENDING] for name in names if _is_temporary(name, name[1:-_ENDING])}


def _is_temporary(name: str, of: str) -> bool:
    return name.startswith(f".{of}.") and _TEMPORARY.fullmatch(name[len(of) + 1 :]) is not None


def refuse_links(folder: Path, within: Callable[[str], bool] = lambda name: True) -> None:
    """Refuse a folder with anything in it, at any depth, but plain files and folders.

    Through a link, files outside the folder could be read or changed; reading a pipe might never end.

    Args:
        folder: the folder.
        within: whether to check a name directly in the folder; default: all are checked.

    Raises:
        FileError: the first such name.
    """
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        with os.scandir(place) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if place == folder and not within(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif entry.is_symlink():
                raise FileError(_link(Path(entry.path)))
            elif not entry.is_file(follow_symlinks=False):
                raise FileError(f"{entry.path}: {_kind(entry)}; {_PLAIN}: remove it")


_PLAIN = "a run folder may contain plain files and folders only"


def _link(path: Path) -> str:
    return f"{path}: is a link; {_PLAIN}: put what it points at in its place, or remove it"


def _kind(entry: os.DirEntry[str]) -> str:
    mode = entry.stat(follow_symlinks=False).st_mode
    return "is a named pipe" if stat.S_ISFIFO(mode) else "is neither a file nor a folder"


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder without links into an existing empty folder.

    Raises:
        FileError: it contains a link, a pipe or a device.
    """
    refuse_links(source)
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
