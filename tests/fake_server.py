"""An OpenAI-compatible server on loopback that does what a test tells it, bounded in requests."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cwdpo.remote import ServerSettings

MOST_REQUESTS = 400


class Fake(ThreadingHTTPServer):
    """Answers each question with the question itself; ``trouble`` may do something else first."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, trouble: Callable[[BaseHTTPRequestHandler, int], bool]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.lock, self.stalls = trouble, threading.Lock(), threading.Event()
        self.away = threading.Event()  # set: every connection is dropped, as of a process that has ended
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.answered: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        if self.server.away.is_set():
            self.drop()
        else:
            self.reply(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.seen)
        if self.server.away.is_set():
            self.drop()
        elif number > MOST_REQUESTS:
            self.fail(400)
        elif not self.server.trouble(self, number):
            text = body["messages"][-1]["content"][-1]["text"]
            with self.server.lock:
                self.server.answered[f"{text} {body.get('seed')}"] += 1
            message = {"role": "assistant", "content": f"re: {text}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply(
                200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            )

    def reply(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int, **headers: str) -> None:
        self.reply(status, {"error": {"message": f"no {status}", "type": "t"}}, **headers)

    def drop(self) -> None:
        """Reset the connection in the middle of an answer."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"id": "x", "cho')
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True  # dropped on purpose

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Fake]]:
    running: list[tuple[Fake, threading.Thread]] = []

    def start(trouble: Callable[[Any, int], bool] = lambda handler, number: False) -> Fake:
        server = Fake(trouble)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.stalls.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
        assert not thread.is_alive()


def says(answer: Callable[[str], str]) -> Callable[[Any, int], bool]:
    """A ``trouble`` that answers the text of each request by ``answer``."""

    def trouble(handler: Any, number: int) -> bool:
        with handler.server.lock:
            text = handler.server.seen[number - 1]["messages"][-1]["content"][-1]["text"]
        choice = {
            "index": 0, "message": {"role": "assistant", "content": answer(text)}, "finish_reason": "stop",
        }  # fmt: skip
        handler.reply(
            200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )
        return True

    return trouble


def seeded(handler: Any, number: int) -> bool:
    """A ``trouble`` whose answer depends on text and seed, as a server's that honours seeds."""
    with handler.server.lock:
        body = handler.server.seen[number - 1]
        text = body["messages"][-1]["content"][-1]["text"]
        handler.server.answered[f"{text} {body['seed']}"] += 1
    said = f"a {random.Random(text + str(body['seed'])).choice(('red', 'blue', 'green', 'grey'))} circle ."
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    handler.reply(
        200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    )
    return True


def to(server: Fake, **changes: Any) -> ServerSettings:
    return ServerSettings(base_url=server.url, model="m", **{"timeout": 5.0, **changes})
