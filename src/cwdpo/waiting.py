"""The processes of a run wait for one that works alone, as long as it takes.

A collective operation of the training's own process group fails when one process comes later than the group's timeout
(10 minutes with NCCL). Judges, servers, downloads, reports and slow disks take longer. So the operations of this module
have a group of their own: gloo on the CPU, with a timeout of a week. A process that waits says so every minute, and if
another one ends, it says that instead of waiting on. With one process they do nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cwdpo.errors import ProcessError

logger = logging.getLogger("cwdpo")
PATIENCE = timedelta(days=7)
EVERY = 60.0
"""Seconds between two messages of a process that waits."""
T = TypeVar("T")
_GROUPS: dict[Any, Any] = {}
"""The patient group, by the group of the training: tests begin several."""


def processes() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several() -> bool:
    """Whether there are other processes."""
    return processes() > 1


def prepare() -> None:
    """Make the group. All processes call this together, before one of them works alone."""
    if several():
        _group()


def wait_for_all(what: str) -> None:
    """Return when all processes have called this.

    Args:
        what: what the others may be doing, for messages.

    Raises:
        ProcessError: another process ended.
    """
    if several():
        with waiting(what):
            dist.barrier(group=_group())


def from_first(value: T, what: str) -> T:
    """The first process's value, on all processes; it must be picklable.

    Raises:
        ProcessError: another process ended.
    """
    if not several():
        return value
    values = [value]
    with waiting(what):
        dist.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def of_all(values: list[T], what: str) -> list[T]:
    """The values of all processes in one list, in the order of the processes; they must be picklable.

    Raises:
        ProcessError: another process ended.
    """
    if not several():
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    with waiting(what):
        dist.all_gather_object(parts, values, group=_group())
    return [value for part in parts for value in part]


def largest(value: int, what: str) -> int:
    """The largest of all processes' values.

    Raises:
        ProcessError: another process ended.
    """
    if not several():
        return value
    found = torch.tensor(value)
    with waiting(what):
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_group())
    return int(found)


@contextmanager
def first_alone(what: str, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first process runs the block; then the others do.

    Args:
        what: what the first one does, for messages.
        then: called by all processes between the two.

    Raises:
        ProcessError: another process ended.
    """
    first = not several() or dist.get_rank() == 0
    if not first:
        wait_for_all(what)
        then()
    yield
    if first:
        wait_for_all(what)
        then()


def group_of(ranks: Sequence[int]) -> Any:
    """A group of some processes that waits as long; ``None`` on the others. All processes call this together."""
    group = dist.new_group(list(ranks), backend="gloo", timeout=PATIENCE)
    return group if dist.get_rank() in ranks else None


def _group() -> Any:
    training = dist.group.WORLD
    if training not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[training] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _GROUPS[training]


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say every minute that this process waits.

    Raises:
        ProcessError: in place of the error of a lost connection.
    """
    done = threading.Event()

    def tell() -> None:
        minutes = 0
        while not done.wait(EVERY):
            minutes += 1
            logger.warning(
                "process %d waits for another since %d min (%s)", dist.get_rank(), minutes * EVERY // 60, what
            )

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"process {dist.get_rank()}: another process of the run ended while this one waited ({what}): its own "
            f"message says why; then continue with --resume ({str(error).splitlines()[0][:150]})"
        ) from None
    finally:
        done.set()
