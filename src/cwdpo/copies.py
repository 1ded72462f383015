"""Copies of a run folder for machines without a shared disk.

The first process's folder is the run. A process that does not see it works in a folder of its own, under the same
name: a *copy*. At the start of a run, one process of each such folder makes it equal to the first one's
(:func:`send_copies`), so that resuming reads the same files everywhere. What the processes there write for a checkpoint
is fetched into the first one's folder (:func:`fetch_written`), so that it has the whole checkpoint. Nothing else is
written to a copy. Where all processes see one folder, these functions do nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cwdpo.errors import RunDirError
from cwdpo.files.checksums import Running
from cwdpo.files.reading import open_file
from cwdpo.files.writing import clear_pieces, refuse_links, replacing, write_text
from cwdpo.waiting import from_first, group_of, of_all, several, wait_for_all, waiting

MARK = ".copy"
"""A file of this name marks a copy; it says where the run is."""
_WHAT = "copying the run folder"
_CHUNK = 2**26
"""Bytes that are sent at once."""
_Listing = Mapping[str, dict[str, Any] | None]
"""Size and digest of files (:meth:`Running.entry`) by name; ``None`` of folders."""


@dataclass(frozen=True)
class _Copies:
    """The copies of a run.

    Attributes:
        folder: this process's own.
        ranks: the first process, and one for each copy.
        group: of these processes; ``None`` in the others.
    """

    folder: Path
    ranks: list[int]
    group: Any


_current: ContextVar[_Copies | None] = ContextVar("copies", default=None)


def refuse_copy(folder: Path) -> None:
    """Refuse to continue a run in a copy of its folder, which lacks what was written since it was made.

    Raises:
        RunDirError: the folder is a copy.
    """
    if (folder / MARK).is_file():
        where = (folder / MARK).read_text(encoding="utf-8").strip()[:300]
        raise RunDirError(
            f"{folder}: is a copy of the run in {where}: start the first process there; if that folder is lost, remove "
            f"{folder / MARK}, and what is here is the run"
        )


@contextmanager
def copied(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Let :func:`send_copies` and :func:`fetch_written` serve a run. All processes of the run call this together.

    Args:
        folder: the run folder; of the first process, it exists.
        note: told which processes have copies.

    Raises:
        RunDirError: a process that does not see the first one's folder has other files under that name.
    """
    copies = _find(folder, note) if several() else None
    token = _current.set(copies)
    try:
        yield
    finally:
        _current.reset(token)


def _find(folder: Path, note: Callable[[str], None]) -> _Copies | None:
    rank = dist.get_rank()
    # Anybody's first look is at a new name: what a network disk remembers of older looks does not count.
    token = from_first(f".shared.{secrets.token_hex(8)}.tmp", _WHAT)
    mine = folder / f"{token}.{rank}.tmp"
    if rank == 0:
        (folder / token).touch()
    wait_for_all(_WHAT)
    sees = (folder / token).is_file()
    folder.mkdir(parents=True, exist_ok=True)
    begun = any(_files(folder, folders=True)) and not (folder / MARK).is_file()
    if not sees:
        mine.touch()
    wait_for_all(_WHAT)
    # A network disk may show the first process's file late. Writing to its folder as to a copy would be damage.
    here = from_first([(folder / f"{token}.{r}.tmp").is_file() for r in range(dist.get_world_size())], _WHAT)
    wait_for_all(_WHAT)
    for path in (mine, *([folder / token] if rank == 0 else [])):
        path.unlink(missing_ok=True)
    place = (socket.gethostname(), str(folder.resolve()))
    found = of_all([(rank, sees or here[rank], place, begun)], _WHAT)
    apart: dict[tuple[str, str], tuple[int, bool]] = {}
    for other, shared, where, filled in found:
        if not shared:
            apart.setdefault(where, (other, filled))
    if not apart:
        return None
    first = ": ".join(found[0][2])
    for where, (_, filled) in apart.items():
        if filled:
            raise RunDirError(
                f"{': '.join(where)}: is no copy of the run in {first}, which its processes do not see: remove it, "
                "choose another --out, or give all processes a disk that they share"
            )
    note(
        f"the run is in {first}; {', '.join(': '.join(where) for where in apart)} "
        f"{'is a copy' if len(apart) == 1 else 'are copies'} for the processes that do not see it"
    )
    ranks = [0, *sorted(leader for leader, _ in apart.values())]
    if rank in ranks[1:]:
        write_text(folder / MARK, f"{first}\n")
    return _Copies(folder, ranks, group_of(ranks))


def send_copies() -> None:
    """Make every copy equal to the first process's folder. All processes call this together.

    Files that a copy has with the same content are not sent again; what the first folder has not is removed.

    Raises:
        FileError: a file cannot be read; a copy contains a link.
        ProcessError: another process ended.
    """
    copies = _current.get()
    if copies is None:
        return
    if copies.group is not None:
        with waiting(_WHAT):
            _send_copies(copies)
    wait_for_all(_WHAT)


def _send_copies(copies: _Copies) -> None:
    first = dist.get_rank() == 0
    if not first:
        refuse_links(copies.folder, lambda name: not _in_work(name))
        for folder in (copies.folder, *(copies.folder / stage for stage in ("stage1", "stage2"))):
            clear_pieces(folder)
    every: list[Any] = [None] * len(copies.ranks)
    dist.all_gather_object(every, _names(copies.folder), group=copies.group)
    wanted: _Listing = every[0]
    if not first:
        _make_room(copies.folder, every[copies.ranks.index(dist.get_rank())], wanted)
    to_all = partial(dist.broadcast, src=0, group=copies.group)
    for name, entry in wanted.items():
        if entry is None or all(other.get(name) == entry for other in every):
            continue
        if first:
            _send(copies.folder / name, entry["bytes"], to_all)
        else:
            with replacing(copies.folder / name) as temporary:
                _receive(temporary, entry["bytes"], to_all)


def _make_room(folder: Path, have: _Listing, wanted: _Listing) -> None:
    """Remove what a copy has and the run has not, and make the run's folders."""
    for name in sorted(have, reverse=True):  # what is in a folder before the folder
        if name in wanted and (have[name] is None) == (wanted[name] is None):
            continue
        path = folder / name
        shutil.rmtree(path) if have[name] is None else path.unlink()
    for name, entry in wanted.items():
        if entry is None:
            (folder / name).mkdir(parents=True, exist_ok=True)


def fetch_written(folder: Path) -> None:
    """Fetch what the processes of copies wrote into a folder, into the first process's folder of the same name.

    All processes call this together, after they wrote their files; each with its own path.

    Raises:
        FileError: a file cannot be read.
        ProcessError: another process ended.
    """
    copies = _current.get()
    if copies is None:
        return
    wait_for_all(_WHAT)  # every process has written
    if copies.group is not None:
        with waiting(_WHAT):
            _fetch_written(copies, folder)
    wait_for_all(_WHAT)


def _fetch_written(copies: _Copies, folder: Path) -> None:
    rank = dist.get_rank()
    own = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    every: list[Any] = [None] * len(copies.ranks)
    dist.all_gather_object(every, own, group=copies.group)
    have = set(every[0])
    for leader, files in zip(copies.ranks[1:], every[1:], strict=True):
        for name, size in files.items():
            if name in have:
                continue
            have.add(name)
            if rank == leader:
                _send(folder / name, size, partial(dist.send, dst=0, group=copies.group))
            elif rank == 0:
                with replacing(folder / name, durable=False) as temporary:
                    _receive(temporary, size, partial(dist.recv, src=leader, group=copies.group))


def _send(path: Path, size: int, send: Callable[[torch.Tensor], Any]) -> None:
    """Send the first ``size`` bytes of a file; more may be appended meanwhile."""
    with open_file(path) as file:
        for length in _lengths(size):
            send(torch.frombuffer(bytearray(file.read(length).ljust(length, b"\0")), dtype=torch.uint8))


def _receive(path: Path, size: int, receive: Callable[[torch.Tensor], Any]) -> None:
    with path.open("wb") as file:
        for length in _lengths(size):
            data = torch.empty(length, dtype=torch.uint8)
            receive(data)
            file.write(data.numpy())


def _lengths(size: int) -> Iterator[int]:
    for start in range(0, size, _CHUNK):
        yield min(_CHUNK, size - start)


def _names(folder: Path) -> _Listing:
    """Everything in a run folder but what belongs to the process that works in it, folders before their contents."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else Running().entry(path)
        for path in _files(folder, folders=True)
    }


def _files(folder: Path, *, folders: bool = False) -> Iterator[Path]:
    for place, inside, names in os.walk(folder):
        inside[:] = sorted(
            name for name in inside if not _in_work(name) and not (Path(place) / name).is_symlink()
        )
        if folders:
            yield from (Path(place) / name for name in inside)
        for name in sorted(names):
            path = Path(place) / name
            if not _in_work(name) and path.is_file() and not path.is_symlink():
                yield path


def _in_work(name: str) -> bool:
    """Whether a name belongs to the process that works in a folder, not to the run: locks, marks, incomplete files."""
    return name in (".lock", MARK) or (name.startswith(".") and name.endswith((".tmp", ".old")))
