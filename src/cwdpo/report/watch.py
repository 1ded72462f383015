"""A run's page, served to this machine only: built anew at every look, refreshing itself, without any script."""

from __future__ import annotations

import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cwdpo.errors import RunDirError
from cwdpo.report.render import render_report

_logger = logging.getLogger(__name__)
HOST = "127.0.0.1"


class _Page(BaseHTTPRequestHandler):
    """Answers ``GET /`` and nothing else."""

    server: WatchServer

    def do_GET(self) -> None:
        """The page as the run stands."""
        # A page of another site must not read this one under a name that leads here (DNS rebinding).
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (HOST, "localhost"):
            self.send_error(403, "answers to 127.0.0.1 and localhost only")
        elif self.path != "/":
            self.send_error(404)
        else:
            body = render_report(self.server.folder, refresh=self.server.every).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """To the log, not to the terminal."""
        _logger.debug(format, *args)


class WatchServer(ThreadingHTTPServer):
    """Serves one run folder; nothing is written to it.

    Args:
        folder: of the run.
        port: 0 for any free one, then :attr:`server_port`.
        every: seconds between two looks of the page.

    Raises:
        RunDirError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int, every: int) -> None:
        self.folder, self.every = folder, every
        try:
            super().__init__((HOST, port), _Page)
        except OSError as error:
            raise RunDirError(
                f"port {port} cannot be used ({error.strerror}): choose another --port, or 0"
            ) from None


def serve(folder: Path, port: int, every: int) -> WatchServer:
    """A server for a run folder, ready for ``serve_forever``."""
    return WatchServer(folder, port, every)
