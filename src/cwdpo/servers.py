"""Servers of one model take requests from one queue, each when it has room. Does not import torch.

With several servers a slow one takes fewer requests, because it has room less often. A request that fails goes back to
the head of the queue, for another server. A server that failed is left out until a health check finds it again; then it
gets one request at a time until one is answered. A server without work repeats a request that another one does not
answer; the first answer counts. With one server, a failure (after the connection's own retries) ends the work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

logger = logging.getLogger("cwdpo")
_LATE = 4.0
"""A request is late after this many times the mean time of an answer, but at least :data:`_SOON` seconds."""
_SOON = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Seconds of the pauses after failures in a row: each is twice as long as the one before, up to the longest."""
_TICK = 0.1
"""Seconds after which a waiting thread looks again for late requests."""
_ABOUT_REQUEST = (400, 413, 422)
"""HTTP statuses that concern the request, not the server."""


class Line(Protocol):
    """The connection to one server."""

    def check(self) -> str | None:
        """Why the server does not answer; ``None`` if it does."""


@dataclass
class Server:
    """One server and what is known of it.

    Attributes:
        url: its address.
        line: the connection.
        up: whether it passed its last health check and has not failed since.
        running: its requests in flight.
        failures: its failures in a row; 0 after an answer.
        checks: its failed health checks in a row.
        until: time (monotonic, in seconds) before which it is not used.
        trouble: its last error.
        answered: number of requests that it answered first.
    """

    url: str
    line: Any
    up: bool = True
    running: int = 0
    threads: int = 0
    failures: int = 0
    checks: int = 0
    until: float = 0.0
    trouble: BaseException | str | None = None
    answered: int = 0


@dataclass(eq=False)
class _Job:
    key: str
    request: Any
    running: dict[str, float] = field(default_factory=dict)  # when it was sent, by address
    failed: list[str] = field(default_factory=list)  # addresses, one for each failure
    over: bool = False


class GivenUpError(Exception):
    """The work cannot go on.

    Attributes:
        server: whose error it is; ``None``: no server is left.
        error: of the last request.
    """

    def __init__(self, server: Server | None, error: BaseException | None = None) -> None:
        super().__init__(str(error))
        self.server, self.error = server, error


class Servers:
    """Sends requests to servers of the same model.

    Args:
        servers: one or more.
        send: sends a request to a server and returns its answer; called in threads.
        keep: called once per request with its key and its first answer, by one thread at a time.
        concurrency: largest number of requests in flight at each server.
        retries: how often a request may fail, and how many health checks all servers may fail, before the work ends.
        failures: types of errors after which another server is tried; others end the work.
    """

    def __init__(
        self,
        servers: Iterable[Server],
        send: Callable[[Server, Any], Any],
        keep: Callable[[str, Any], None],
        *,
        concurrency: int,
        retries: int,
        failures: tuple[type[BaseException], ...],
    ) -> None:
        self.servers = tuple(servers)
        self._send, self._keep, self._failures = send, keep, failures
        self._concurrency, self._retries = concurrency, retries
        self._several = len(self.servers) > 1
        for server in self.servers:
            server.up = not self._several  # the first health check comes before the first request
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._jobs: dict[str, _Job] = {}
        self._problem: GivenUpError | None = None
        self._seconds = self._answers = 0.0

    def submit(self, requests: Mapping[str, Any]) -> None:
        """Queue requests by key; returns at once. A key that is queued or in flight already is not queued again."""
        with self._changed:
            for key, request in requests.items():
                if key not in self._jobs:
                    self._jobs[key] = job = _Job(key, request)
                    self._queue.append(job)
            for server in self.servers:
                self._employ(server)

    def wait(self, keys: Iterable[str]) -> None:
        """Return when these requests, of those submitted, have been answered.

        Raises:
            GivenUpError: the work ended. Everything is removed from the queue.
        """
        wanted = list(keys)
        with self._changed:
            while any(key in self._jobs for key in wanted) and self._problem is None:
                self._changed.wait()
            if self._problem is None:
                return
            if not self._several:  # what is in flight is still answered, and kept
                self._changed.wait_for(lambda: self.servers[0].running == 0)
            problem, self._problem = self._problem, None
            self._jobs.clear()
            self._queue.clear()
            for server in self.servers:
                server.checks = 0
        raise problem

    def _employ(self, server: Server) -> None:
        """Start the threads that a server lacks; one that is left out has one, for its health checks."""
        wanted = self._concurrency if server.up and not server.failures else 1
        for _ in range(server.threads, min(wanted, server.threads + len(self._jobs))):
            server.threads += 1
            threading.Thread(target=self._work, args=(server,), daemon=True).start()

    def _work(self, server: Server) -> None:
        while (job := self._next(server)) is not None:
            try:
                answer = self._send(server, job.request)
            except BaseException as error:
                with self._changed:
                    self._failed(server, job, error)
                    self._changed.notify_all()
            else:
                with self._changed:
                    self._answered(server, job, answer)
                    self._changed.notify_all()

    def _next(self, server: Server) -> _Job | None:
        """The next request for a server; waits until there is one. ``None``: the thread is not needed any more."""
        with self._changed:
            while self._jobs and self._problem is None:
                now = time.monotonic()
                alone = not server.up or bool(server.failures)
                if alone and server.threads > 1:
                    break
                if now < server.until:
                    self._changed.wait(min(server.until - now, _TICK))
                elif not server.up:
                    self._check(server)
                elif (job := self._pick(server, now)) is not None:
                    server.running += 1
                    job.running[server.url] = now
                    return job
                elif not self._several:
                    break
                else:
                    self._changed.wait(_TICK)
            server.threads -= 1
            return None

    def _pick(self, server: Server, now: float) -> _Job | None:
        others = {s.url for s in self.servers if s.up and s is not server}
        for job in self._queue:
            if server.url not in job.failed or others <= set(job.failed):
                self._queue.remove(job)
                return job
        if not self._several or not self._answers:
            return None
        late = max(_LATE * self._seconds / self._answers, _SOON)
        for job in self._jobs.values():
            if len(job.running) == 1 and server.url not in (*job.running, *job.failed):
                (sent,) = job.running.values()
                if now - sent > late:
                    return job
        return None

    def _check(self, server: Server) -> None:
        """Ask a server that is left out whether it answers; the lock is released meanwhile."""
        self._changed.release()
        try:
            trouble = server.line.check()
        finally:
            self._changed.acquire()
        if trouble is None:
            if server.checks or server.trouble is not None:
                logger.warning("%s answers again and is used", server.url)
            server.up, server.checks = True, 0
            self._employ(server)
            return
        server.checks += 1
        if server.trouble is None:
            logger.warning("%s does not answer (%s): it is left out until it does", server.url, trouble)
        server.trouble = server.trouble or trouble
        server.until = time.monotonic() + _pause(server.checks)
        if all(not s.up and s.checks > self._retries for s in self.servers):
            self._problem = self._problem or GivenUpError(None)
            self._changed.notify_all()

    def _answered(self, server: Server, job: _Job, answer: Any) -> None:
        server.running -= 1
        sent = job.running.pop(server.url, None)
        server.failures, server.until, server.trouble = 0, 0.0, None
        if not job.over:
            job.over = True
            try:
                self._keep(job.key, answer)
            except BaseException as error:  # a full disk
                self._problem = self._problem or GivenUpError(server, error)
                return
            self._jobs.pop(job.key, None)
            server.answered += 1
            if sent is not None:
                self._answers, self._seconds = self._answers + 1, self._seconds + time.monotonic() - sent
        self._employ(server)

    def _failed(self, server: Server, job: _Job, error: BaseException) -> None:
        server.running -= 1
        job.running.pop(server.url, None)
        if not isinstance(error, self._failures) or not self._several:
            self._problem = self._problem or GivenUpError(server, error)
            return
        status = getattr(error, "status_code", None)
        if status not in _ABOUT_REQUEST:
            self._leave_out(server, error, status)
        if job.over:
            return
        job.failed.append(server.url)
        live = {s.url for s in self.servers if s.up}
        refused = status in _ABOUT_REQUEST and live <= set(job.failed)
        if refused or len(job.failed) > self._retries:
            self._problem = self._problem or GivenUpError(server, error)
        elif job.key in self._jobs and not job.running and job not in self._queue:
            self._queue.appendleft(job)

    def _leave_out(self, server: Server, error: BaseException, status: int | None) -> None:
        if server.trouble is None:
            logger.warning("%s: %s: %s", server.url, type(error).__name__, str(error)[:200])
        server.trouble = error
        server.failures += 1
        server.until = time.monotonic() + _pause(server.failures)
        server.up = status == 429  # it only asked for a pause


def _pause(n: int) -> float:
    return min(_FIRST_PAUSE * 2.0 ** (n - 1), _LONGEST_PAUSE)
