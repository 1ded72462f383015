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
        cpu: the CPU time of this process and its threads, in seconds. Other work on the machine does not count in it.

    Attributes:
        began: when the clock was started.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self._now, self._cpu = now, cpu
        self.began = self._since = now()
        self._cpu_since = cpu()
        self._open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._cpu_seconds: defaultdict[str, float] = defaultdict(float)

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
        return self.take_both()[0]

    def take_both(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by part since the last call, and CPU seconds by part."""
        self._count()
        taken = dict(self._seconds), dict(self._cpu_seconds)
        self._seconds, self._cpu_seconds = defaultdict(float), defaultdict(float)
        return taken

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was started."""
        return self._now() - self.began

    def _count(self) -> None:
        now, cpu = self._now(), self._cpu()
        inner = self._open[-1] if self._open else OTHER
        name = inner if len(self._open) < 2 else f"{self._open[0]}: {inner}"
        self._seconds[name] += now - self._since
        self._cpu_seconds[name] += cpu - self._cpu_since
        self._since, self._cpu_since = now, cpu


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
