"""An ``openai`` client with limits of time and size for each answer, and without redirects.

The package's own timeout counts seconds without a byte: with a server that sends byte by byte, a request would never
end. Here the whole attempt has a time limit. Redirects are not followed, because they would send prompts, images and
the key to another address.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

MOST_BYTES = 2**24
"""Largest size of an answer; usual responses have some thousands."""
CHECK_SECONDS = 5.0
"""Longest wait for the answer to a health check."""


class Connection:
    """A client for one server.

    Args:
        openai: the imported package.
        base_url, api_key, retries: as in the package.
        timeout: largest number of seconds for an attempt, from its start to the last byte.
    """

    def __init__(self, openai: Any, *, base_url: str, api_key: str, timeout: float, retries: int) -> None:
        self._timeout, self._unreached = timeout, openai.APIConnectionError
        self._attempt = threading.local()
        http = importlib.import_module("httpx2")  # what `openai` is built on
        bounded = type("_Bounded", (_Bounded, http.SyncByteStream), {})
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,
                # Each attempt has its own connection: closing it must not affect another.
                limits=http.Limits(max_keepalive_connections=0),
                event_hooks={
                    "request": [self._begin],
                    "response": [lambda response: _limit(response, bounded)],
                },
            ),
        )

    def post(self, **request: Any) -> bytes:
        """Request a chat completion.

        Returns:
            The body of the answer.

        Raises:
            openai.OpenAIError: no answer in time, a redirect, or an error status, after all retries.
        """
        try:
            return bytes(self._client.chat.completions.with_raw_response.create(**request).content)
        finally:
            self._end()

    def send(self, path: str, **body: Any) -> bytes:
        """Post a request of another kind, ``path`` being relative to the address; see :meth:`post`."""
        http = importlib.import_module("httpx2")
        try:
            client = self._client.with_options(max_retries=0)
            return bytes(client.post(path, body=body, cast_to=http.Response).content)
        finally:
            self._end()

    def check(self) -> str | None:
        """Request the list of models, which costs a server nothing.

        Returns:
            Why the server cannot work now; ``None`` if it answers, with whatever but an error of its own.
        """
        try:
            self._client.with_options(max_retries=0, timeout=min(self._timeout, CHECK_SECONDS)).models.list()
        except Exception as error:  # the package's, httpx's, and those of parsing
            broken = getattr(error, "status_code", None) in (500, 502, 503, 504)
            if broken or isinstance(error, self._unreached):
                return f"{type(error).__name__}: {error}"
        finally:
            self._end()
        return None

    def _begin(self, request: Any) -> None:
        """Start the timer of an attempt, which shuts down the attempt's sockets when the time is over."""
        self._end()
        sockets: list[socket.socket] = []

        def trace(_: str, info: dict[str, Any]) -> None:
            found = info.get("return_value")
            with contextlib.suppress(AttributeError):
                sockets.append(found.get_extra_info("socket"))  # type: ignore[union-attr]

        def cut() -> None:
            for one in sockets:
                with contextlib.suppress(OSError, AttributeError):
                    one.shutdown(socket.SHUT_RDWR)

        request.extensions["trace"] = trace
        self._attempt.timer = threading.Timer(self._timeout, cut)
        self._attempt.timer.daemon = True
        self._attempt.timer.start()

    def _end(self) -> None:
        timer = getattr(self._attempt, "timer", None)
        if timer is not None:
            timer.cancel()


class _Bounded:
    """A response's bytes, at most :data:`MOST_BYTES`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > MOST_BYTES:
                raise ValueError(f"the answer has more than {MOST_BYTES} bytes")
            yield part

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()


def _limit(response: Any, bounded: Any) -> None:
    packed = response.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise ValueError(f"the answer is compressed by {packed[:40]!r}, which was not requested")
    response.stream = bounded(response.stream)
