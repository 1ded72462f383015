"""Worker processes that decode and process images ahead of their use, and encode rows (:mod:`.encoding`).

A worker has a copy of the prompt encoder without its caches. It gets one prompt at a time and returns the inputs of the
vision tower. They come back through shared memory and are copied when they arrive: so neither the size of the shared
memory nor the limit of open files bounds how far ahead is read.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from cwdpo.errors import CwdpoError, DataError, WorkerError
from cwdpo.records import Example

if TYPE_CHECKING:
    from torch import Tensor

    from cwdpo.data.encode.prompts import PromptEncoder

logger = logging.getLogger("cwdpo")
PROMPTS_AHEAD = 16
"""Prompts that are read ahead at least, if the batches are small."""
_SHARED = 2**28
"""Bytes of free shared memory for each worker; with less (containers), results come through a pipe, which is slower."""
Images = Mapping[str, "Tensor"]
_Result = tuple[type[CwdpoError] | None, Any]
"""An error and its text, or ``None`` and the images."""
S = TypeVar("S")
T = TypeVar("T")


def read_ahead(
    items: Iterable[S], begin: Callable[[S], T], prompts: Callable[[S], int], window: int = 1
) -> Iterator[T]:
    """Yield every item after ``begin``; those that follow are begun before one is yielded.

    Args:
        items: batches, in any form.
        begin: begins to read the images of a batch; returns the batch that waits for them.
        prompts: number of prompts of a batch.
        window: batches that are begun ahead; more, if they have less than :data:`PROMPTS_AHEAD` prompts. 0: none.
    """
    source, begun, waiting = iter(items), deque[tuple[T, int]](), 0
    while True:
        while len(begun) <= window or (window and waiting < PROMPTS_AHEAD):
            try:
                item = next(source)
            except StopIteration:
                break
            begun.append((begin(item), prompts(item)))
            waiting += begun[-1][1]
        if not begun:
            return
        first, n = begun.popleft()
        waiting -= n
        yield first


@dataclass(frozen=True)
class Job:
    """One prompt to read: its row and text, the token ids and per-token values that it was encoded to, and the digest
    of its images."""

    example: Example
    text: str
    ids: tuple[int, ...]
    per_token: Mapping[str, tuple[int, ...]]
    digest: str


class Coming:
    """The images of one prompt that a worker reads; called, it waits for them.

    Args:
        arrived: the worker's result.
        keep: called once with the images.
    """

    def __init__(self, arrived: Future[_Result], keep: Callable[[Images], None]) -> None:
        self._arrived, self._keep = arrived, keep
        self._images: Images | None = None

    def __call__(self) -> Images:
        """The images.

        Raises:
            DataError: see :meth:`cwdpo.data.encode.prompts.PromptEncoder.read`.
            WorkerError: the worker was killed.
        """
        if self._images is None:
            try:
                error, found = self._arrived.result()
            except BrokenProcessPool:
                raise dead_worker("images were read") from None
            if error is not None:
                raise error(found)
            self._images = found
            self._keep(found)
        return self._images


def dead_worker(while_: str) -> WorkerError:
    """The error when a worker was killed."""
    return WorkerError(
        f"a data worker died while {while_} (the system kills processes if memory runs out): lower "
        "train.dataloader_workers (CWDPOConfig: dataloader_num_workers; with 0 the main process does their work), then "
        "continue with --resume"
    )


class Workers:
    """Processes that read images and encode rows. They start with the first use, and end with this process.

    Args:
        encoder: each process gets a copy.
        n: number of processes.
    """

    def __init__(self, encoder: PromptEncoder, n: int) -> None:
        self.n, self._pinned, self._warm = n, False, False
        self._encoder: PromptEncoder | None = encoder
        self._pool: ProcessPoolExecutor | None = None

    def warm_up(self) -> None:
        """Start the process that workers are forked from: it imports torch and the processor, and nobody waits."""
        if self._warm or self._encoder is None or "forkserver" not in multiprocessing.get_all_start_methods():
            return
        self._warm = True
        from multiprocessing import forkserver

        processor = self._encoder.processor
        parts = (processor, getattr(processor, "image_processor", None))
        known = [n for n in (type(part).__module__ for part in parts) if n.startswith("transformers.")]
        with _without_script():
            forkserver.set_forkserver_preload([__name__, "torch.multiprocessing", *known])
            forkserver.ensure_running()

    def submit(self, job: Job) -> Future[_Result] | None:
        """Let a worker read a prompt; ``None`` if the processor cannot be copied, which is said once."""
        sent = self.call(_read, job)
        if sent is None:
            return None
        arrived: Future[_Result] = Future()
        sent.add_done_callback(partial(_deliver, arrived, self._pinned))
        return arrived

    def call(self, function: Callable[[S], T], argument: S) -> Future[T] | None:
        """Let a worker call a function, which finds its encoder in :data:`HERE`; ``None`` as in :meth:`submit`."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            self._start(encoder)
        if self._pool is None:
            return None
        try:
            with _without_script():
                return self._pool.submit(function, argument)
        except BrokenProcessPool as error:
            broken: Future[T] = Future()
            broken.set_exception(error)
            return broken

    def _start(self, encoder: PromptEncoder) -> None:
        import torch

        why, copied = "", b""
        try:
            copied = pickle.dumps(encoder)
        except Exception as error:  # processors may be the code of others, and hold anything
            why = " ".join(str(error).split())
        if b"__main__" in copied:
            why = f"{type(encoder.processor).__name__} is defined in the script that runs"
        if why:
            logger.warning(
                "the main process decodes the images: the processor cannot be copied to workers (%s)", why
            )
            return
        self._pinned = torch.cuda.is_available()
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._pool = ProcessPoolExecutor(
            self.n, multiprocessing.get_context(method), _begin, (copied, _enough_shared_memory(self.n))
        )


def _deliver(arrived: Future[_Result], pinned: bool, sent: Future[_Result]) -> None:
    """Copy a worker's result, in the thread that received it; the shared memory is then free."""
    try:
        error, found = sent.result()
        if error is None:
            images = pickle.loads(found) if isinstance(found, bytes) else found
            found = {name: value.pin_memory() if pinned else value.clone() for name, value in images.items()}
    except BaseException as problem:
        arrived.set_exception(problem)
    else:
        arrived.set_result((error, found))


def _enough_shared_memory(n: int) -> bool:
    try:
        return shutil.disk_usage("/dev/shm").free > n * _SHARED
    except OSError:  # not Linux
        return True


@contextmanager
def _without_script() -> Iterator[None]:
    """Hide the running script from new processes, which would else run it again if it does not guard against that."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


# --- in a worker ---------------------------------------------------------------------------------------

HERE: dict[str, Any] = {}
"""In a worker: its ``encoder``, or the ``problem`` why it has none; and whether it ``shares`` memory."""


def _begin(copied: bytes, shares: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and decides
    HERE["shares"] = shares
    try:
        import torch.multiprocessing  # it also makes tensors go through shared memory

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are what runs in parallel
        logging.getLogger("transformers").setLevel(logging.ERROR)  # what is to say, the parent has said
        torch.set_num_threads(1)
        HERE["encoder"] = pickle.loads(copied)
    except Exception as error:
        HERE["problem"] = f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(job: Job) -> _Result:
    if "problem" in HERE:
        return WorkerError, (
            f"a data worker cannot load the processor ({HERE['problem']}): set train.dataloader_workers to 0"
        )
    try:
        images = dict(HERE["encoder"].read(job))
    except DataError as error:  # as a text, because not every error can be pickled
        return DataError, str(error)
    return None, images if HERE["shares"] else pickle.dumps(images)
