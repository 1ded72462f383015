"""Renders chat templates in a child process with limits of processor time, memory and length.

A template is a program. Jinja's sandbox protects files and Python's internals, but not against infinite loops or
``'a' * 10**10``. The child is forked from this process, so it has the processor without loading it again. Where there
is no ``fork`` (Windows), there are no limits.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.errors import DataError, ModelError
from cwdpo.records import Message

SECONDS = 10.0
"""Processor time for one rendering."""
PATIENCE = 12
"""Waiting time for one rendering, as a multiple of its processor time: the machine may be busy."""
MEMORY = 2**30
"""Bytes that rendering may use in addition to what this process uses."""
MOST_CHARACTERS = 2**24


Order = tuple[list[dict[str, Any]], bool, list[Any]]
"""A conversation, whether it ends with the start of a response, and the tools."""


@dataclass(frozen=True)
class Asked:
    """Conversations to render together.

    ``numbers``: of each prompt. ``orders``: by the prompt's number and the response; ``None`` for the prompt alone.
    """

    numbers: Mapping[tuple[Message, ...], int]
    orders: Mapping[tuple[int, str | None], Order]


class Renderer:
    """Calls ``processor.apply_chat_template`` within the limits.

    Args:
        processor: the result of ``AutoProcessor.from_pretrained``, or its tokenizer.
        seconds: time limit for one rendering.
    """

    def __init__(self, processor: Any, seconds: float = SECONDS) -> None:
        self._processor, self._seconds = processor, seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._given_up = ""
        self._together = True

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts a child of its own."""
        return Renderer, (self._processor, self._seconds)

    def __call__(self, chat: Sequence[dict[str, Any]], *, generation: bool, tools: Sequence[Any] = ()) -> str:
        """The conversation as text; with ``generation`` it ends with the start of a response.

        Raises:
            ModelError: the template exceeded a limit. It is not tried again.
            DataError: the template refuses the conversation.
        """
        if not hasattr(os, "fork"):
            return _rendered(self._processor, chat, generation, tools)
        with self._lock:
            if self._given_up:
                raise ModelError(self._given_up)
            text = self._answer(json.dumps([[list(chat), generation, list(tools)]]).encode())
            if text is None:
                self._given_up = (
                    f"the chat template of {_name(self._processor)} did not end within {self._seconds:g} seconds and "
                    f"{MEMORY // 2**20} MiB, or gave more than {MOST_CHARACTERS} characters: set another chat "
                    "template, or take another checkpoint"
                )
                raise ModelError(self._given_up)
        found = json.loads(text)[0]
        if "error" in found:
            raise DataError(found["error"])
        return str(found["text"])

    def many(self, orders: Sequence[Order]) -> list[str | None]:
        """Conversations as text with one message to the child; ``None`` for those that must be rendered alone.

        If a limit is exceeded, all of them must be, from now on.
        """
        if not (hasattr(os, "fork") and self._together and orders):
            return [None] * len(orders)
        with self._lock:
            text = self._answer(json.dumps(orders).encode())
            if text is None:
                self._together = False
                return [None] * len(orders)
        return [found.get("text") for found in json.loads(text)]

    def _answer(self, order: bytes) -> bytes | None:
        """The child's answer; ``None`` if a limit was exceeded.

        A child that died is replaced once: it may have been killed by others, or its fork may have failed.
        """
        for _ in range(2):
            try:
                text = self._started().ask(order, self._seconds)
            except _DiedError:
                self._end()
                continue
            if text is None:
                self._end()
            return text
        return None

    def _started(self) -> _Child:
        if self._child is None or self._child.owner != os.getpid():
            self._child = _Child(self._processor)
            weakref.finalize(self, self._child.end, os.getpid())
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.end(os.getpid())
        self._child = None


class _DiedError(Exception):
    """The child is gone; of a template that takes too much memory or makes too long a text, too."""


class _Child:
    """A forked process that renders the conversations of a message, one at a time."""

    def __init__(self, processor: Any) -> None:
        self.owner = os.getpid()
        orders, self._send = os.pipe()
        self._receive, answers = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of the parent: the child uses none
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                # The parent's garbage stays: torch aborts when a mapped tensor is freed whose file is closed here.
                gc.freeze()
                _close_all_but(orders, answers)
                _serve(processor, orders, answers)
                code = 0
            finally:
                os._exit(code)
        os.close(orders)
        os.close(answers)

    def ask(self, order: bytes, seconds: float) -> bytes | None:
        """The answer; ``None`` if the process did not answer in time.

        Raises:
            _DiedError: the process ended.
        """
        until, used = time.monotonic() + PATIENCE * seconds, _cpu_seconds(self.pid)
        try:
            _write(self._send, order)
        except BrokenPipeError:
            raise _DiedError from None
        data = b""
        size = 4
        while len(data) < size:
            if time.monotonic() > until:
                return None
            if not select.select([self._receive], [], [], 0.2)[0]:
                if _cpu_seconds(self.pid) - used > seconds:
                    return None
                continue
            part = os.read(self._receive, 2**16)
            if not part:
                raise _DiedError
            data += part
            if size == 4 and len(data) >= 4:
                size = 4 + struct.unpack("!I", data[:4])[0]
                if size > 8 * MOST_CHARACTERS:
                    return None
        return data[4:]

    def end(self, owner: int) -> None:
        """Stop the child, if it is a child of this process."""
        if os.getpid() != owner or self.pid == 0:
            return
        for handle in (self._send, self._receive):
            with contextlib.suppress(OSError):
                os.close(handle)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = 0


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, where the system tells it; else 0."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _close_all_but(*kept: int) -> None:
    """Close the other file handles: else the child would keep the run's lock and output open after its parent ended."""
    null = os.open(os.devnull, os.O_RDWR)
    for handle in range(3):
        os.dup2(null, handle)
    after = 3
    for handle in sorted(kept):
        os.closerange(after, handle)
        after = handle + 1
    os.closerange(after, os.sysconf("SC_OPEN_MAX"))


def _serve(processor: Any, orders: int, answers: int) -> None:
    """The child's loop, until the parent closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    _limit_memory()
    parent, together = os.getppid(), _Together(processor)
    with os.fdopen(orders, "rb", buffering=0) as file:
        while True:
            # Other children of the parent may keep the pipe open when the parent is killed.
            while not select.select([orders], [], [], 5.0)[0]:
                if os.getppid() != parent:
                    return
            if not (head := _read(file, 4)):
                return
            orders_ = json.loads(_read(file, struct.unpack("!I", head)[0]))
            try:
                found = together(orders_) or [_answer_of(processor, *order) for order in orders_]
            except MemoryError:
                return
            if any(len(one.get("text", "")) > MOST_CHARACTERS for one in found):
                return
            _write(answers, json.dumps(found).encode())


def _answer_of(
    processor: Any, chat: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Any]
) -> dict[str, str]:
    """The text of one conversation, or the template's error."""
    try:
        return {"text": _rendered(processor, chat, generation, tools)}
    except MemoryError:
        raise
    except Exception as error:  # templates can raise any error
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


class _Together:
    """Renders conversations with few calls of the processor, as long as the first ones are those of single calls."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._usable, self._checked = processor, True, False

    def __call__(self, orders: Sequence[Order]) -> list[dict[str, str]]:
        """The texts; empty if each conversation must be rendered alone, as where one is refused."""
        if len(orders) < 2 or not self._usable or any(tools or not chat for chat, _, tools in orders):
            return []
        found: list[Any] = [None] * len(orders)
        try:
            for generation in (False, True):
                places = [i for i, order in enumerate(orders) if order[1] is generation]
                texts = self._processor.apply_chat_template(
                    [orders[i][0] for i in places], tokenize=False, add_generation_prompt=generation
                )  # fmt: skip
                self._usable = isinstance(texts, list) and len(texts) == len(places)
                for i, text in zip(places, texts if self._usable else (), strict=False):
                    found[i] = {"text": str(text)}
        except MemoryError:
            raise
        except Exception:  # of one conversation: rendering it alone gives the error
            return []
        if self._usable and not self._checked:
            self._checked = True
            self._usable = found == [_answer_of(self._processor, *order) for order in orders]
        return found if self._usable else []


def _read(file: Any, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := file.read(size - len(data))):
        data += part
    return data


def _limit_memory() -> None:
    import resource

    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: only time and length are limited
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = now + MEMORY if hard == resource.RLIM_INFINITY else min(now + MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _rendered(processor: Any, chat: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Any]) -> str:
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    return str(
        processor.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=generation, **more)
    )


def _write(handle: int, data: bytes) -> None:
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(handle, data) :]


def _name(processor: Any) -> str:
    tokenizer = getattr(processor, "tokenizer", processor)
    return str(getattr(tokenizer, "name_or_path", "") or "the checkpoint")
