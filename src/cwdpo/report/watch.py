"""Serves the page of a run to this machine only. It is rendered again when the run changes, and reloads by itself."""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cwdpo.errors import CwdpoError, RunDirError
from cwdpo.report.render import render_report
from cwdpo.rundir import RunDir

_logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
REST = 4.0
"""After each rendering, the page is not rendered again for this many times the duration of the rendering."""
PATIENCE = 20.0
"""Seconds that a client may take to send its request."""


class Page:
    """The page of one run folder, rendered by one thread at a time.

    Matplotlib's settings are global in the process, so two renderings at the same time would affect each other.

    Args:
        draw: returns the page's text; it may raise.
        stamp: returns a value that changes when the page must be rendered again.
        rest: seconds without rendering per second of rendering.
    """

    def __init__(self, draw: Callable[[], str], stamp: Callable[[], object], rest: float = REST) -> None:
        self._draw, self._stamp, self._rest = draw, stamp, rest
        self._lock = threading.Lock()
        # Always the same thread: matplotlib keeps open fonts for every thread that has drawn.
        self._artist = ThreadPoolExecutor(1)
        self._text, self._status = "", 0
        self._of: object = None
        self._next = 0.0

    def get(self) -> tuple[int, str]:
        """HTTP status and text of the page, rendered again if needed. During a rendering, others get the last page."""
        if self._lock.acquire(blocking=self._status == 0):
            try:
                stamp = self._stamp()
                if self._status == 0 or (stamp != self._of and time.monotonic() >= self._next):
                    self._of = stamp
                    self._renew()
            finally:
                self._lock.release()
        return self._status, self._text

    def close(self) -> None:
        """End the thread that draws."""
        self._artist.shutdown()

    def _renew(self) -> None:
        begun = time.monotonic()
        try:
            self._text, self._status = self._artist.submit(self._draw).result(), 200
        except Exception as error:  # any error of a damaged or incomplete file; the next request may succeed
            _logger.debug("the page could not be rendered", exc_info=True)
            said = (
                str(error) if isinstance(error, CwdpoError | OSError) else f"{type(error).__name__}: {error}"
            )
            self._text, self._status = _trouble(said), 500
        now = time.monotonic()
        self._next = now + self._rest * (now - begun)


def _trouble(said: str) -> str:
    return (
        '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="10"><title>cwdpo</title>'
        f"<p>The run cannot be shown now: {html.escape(said)}</p>\n"
    )


def stamp_of(folder: Path) -> object:
    """Names, sizes and modification times of the files that a page may show."""
    found = []
    for place in (folder, folder / "stage1", folder / "stage2"):
        for path in sorted(place.glob("*")) if place.is_dir() else ():
            try:
                info = path.stat()
            except OSError:
                continue  # deleted in the meantime
            found.append((path.name, info.st_size, info.st_mtime_ns))
    return found


class _Handler(BaseHTTPRequestHandler):
    """Answers ``GET /`` and nothing else."""

    server: WatchServer
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Send the current page."""
        # Another website must not read this page through a host name that points to this machine (DNS rebinding).
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (HOST, "localhost"):
            self.send_error(403, "answers to 127.0.0.1 and localhost only")
        elif self.path != "/":
            self.send_error(404)
        else:
            status, text = self.server.page.get()
            body = text.encode(errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write to the log, not to the terminal."""
        _logger.debug(format, *args)


class WatchServer(ThreadingHTTPServer):
    """Serves one run folder; nothing is written to it.

    Args:
        folder: run folder.
        port: 0 for any free port; see :attr:`server_port`.
        every: seconds between two reloads of the page.
        rest: see :class:`Page`.

    Raises:
        RunDirError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int, every: int, rest: float = REST) -> None:
        def draw() -> str:
            RunDir.open(folder)
            return render_report(folder, refresh=every)

        self.page = Page(draw, lambda: stamp_of(folder), rest)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise RunDirError(
                f"port {port} cannot be used ({error.strerror}): choose another --port, or 0"
            ) from None

    def server_close(self) -> None:
        """Close the port and end the thread that draws."""
        super().server_close()
        self.page.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Write errors of a connection to the log, not to the terminal."""
        _logger.debug("a request ended early", exc_info=True)


def serve(folder: Path, port: int, every: int, rest: float = REST) -> WatchServer:
    """A server for a run folder, ready for ``serve_forever``."""
    return WatchServer(folder, port, every, rest)
