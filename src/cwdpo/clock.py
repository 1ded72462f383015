"""Where the time of a run goes. Imports nothing of the project, so that every room can use it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

OTHER = "other"
"""The name of the time that belongs to no part."""


class Clock:
    """Seconds by part; every second counts once, for the innermost part.

    A part inside another is named ``outermost: innermost``, for instance ``step: forward``.

    Args:
        now: the time in seconds.

    Attributes:
        began: when the clock was started.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.began = self._since = now()
        self._open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def begin(self, name: str) -> None:
        """Begin a part."""
        self._count()
        self._open.append(name)

    def end(self) -> None:
        """End the part that was begun last."""
        self._count()
        self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self._count()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was started."""
        return self._now() - self.began

    def _count(self) -> None:
        now = self._now()
        inner = self._open[-1] if self._open else OTHER
        self._seconds[inner if len(self._open) < 2 else f"{self._open[0]}: {inner}"] += now - self._since
        self._since = now


_running: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def running(clock: Clock) -> Iterator[Clock]:
    """Let :func:`spent_on` count on a clock."""
    token = _running.set(clock)
    try:
        yield clock
    finally:
        _running.reset(token)


def current() -> Clock | None:
    """The running clock; ``None`` if nobody wants to know."""
    return _running.get()


@contextmanager
def spent_on(*names: str) -> Iterator[None]:
    """Count what is done inside as a part of the running clock, if there is one.

    Args:
        names: the part; with two, the part and a part of it.
    """
    clock = _running.get()
    if clock is None:
        yield
        return
    for name in names:
        clock.begin(name)
    try:
        yield
    finally:
        for _ in names:
            clock.end()
