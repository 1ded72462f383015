"""Runs cells in parallel processes and reports progress; a failed cell does not stop the others."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import Empty
from typing import Any, Literal

from cwdpo.files.writing import write_text
from cwdpo.lab import server
from cwdpo.lab.cell import CellJob, run_cell
from cwdpo.lab.progress import Progress

Tick = tuple[str, str, int, int]
"""(cell key, stage, step, steps)."""

_ticks: Any = None


@dataclass(frozen=True)
class CellResult:
    """The figures of a finished cell, or the error of a failed one."""

    key: str
    status: Literal["done", "failed", "waiting"]
    figures: dict[str, Any]
    error: str | None
    seconds: float


OnEvent = Callable[[Tick | CellResult], None]
Bar = Callable[[Progress], AbstractContextManager[OnEvent]]
"""Opens a display of the progress; gives the callback for steps and finished cells, which the progress has counted."""


@contextmanager
def no_bar(progress: Progress) -> Iterator[OnEvent]:
    """Show no progress."""
    del progress
    yield lambda event: None


def _prepare(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import warnings

    import torch
    from transformers.utils import logging

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _end_with_parent() -> None:
    """End this worker when its parent ends: a worker left behind would write into the folders of the next start."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: CellJob) -> CellResult:
    began = time.monotonic()
    try:
        figures = run_cell(job, lambda stage, step, steps: _ticks.put((job.key, stage, step, steps)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        write_text(job.folder / "error.txt", traceback.format_exc())
        return CellResult(job.key, "failed", {}, text, time.monotonic() - began)
    return CellResult(job.key, "done", figures, None, time.monotonic() - began)


def run_grid(waves: Sequence[Sequence[CellJob]], workers: int, on_event: OnEvent) -> dict[str, CellResult]:
    """Run waves of cells one after another, and the cells of a wave in parallel processes.

    The processes stay for all waves. Each gets cells of the data that it has read already, as far as there are any.

    Args:
        waves: cells of a later wave may use files that an earlier wave wrote.
        workers: number of processes, with one torch thread each.
        on_event: called with every optimizer step and every finished cell.

    Returns:
        The results by cell key.
    """
    results: dict[str, CellResult] = {}

    def note(event: Tick | CellResult) -> None:
        if isinstance(event, CellResult):
            results[event.key] = event
        on_event(event)

    with _workers(max(1, min(workers, max(map(len, waves), default=1)))) as (pool, ticks):
        for wave in waves:
            for job in wave:
                job.folder.mkdir(parents=True, exist_ok=True)
            lost = _run(wave, pool, ticks, note)
            # Their processes died (killed, out of memory): once more, with nothing beside them.
            for job in lost:
                if _run([job], pool[:1], ticks, note):
                    note(CellResult(job.key, "failed", {}, "its process was killed; out of memory?", 0.0))
    return results


class Worker:
    """One process that runs one cell at a time; after it died, the next cell gets a new one.

    Attributes:
        read: the data of the cells that the process has run, the last one's at the end.
    """

    def __init__(self, ticks: Any) -> None:
        self._ticks = ticks
        self._pool: ProcessPoolExecutor | None = None
        self.read: list[str] = []

    def begin(self, job: CellJob) -> Future[CellResult]:
        """Let the process run a cell."""
        if self._pool is None:
            context = mp.get_context(server.METHOD)
            self._pool = ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(self._ticks,))
        self.read = [*(data for data in self.read if data != data_of(job)), data_of(job)]
        return self._pool.submit(_work, job)

    def end(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self.read = None, []


def data_of(job: CellJob) -> str:
    """What a process that has run the cell has read."""
    return str(job.recipe.data.path)


def next_cell(waiting: Sequence[CellJob], read: Sequence[str], busy: Collection[str]) -> CellJob:
    """The cell that a free process runs next.

    Its data are those that no other process is at, if there are any, and of these the ones that this process has read
    last; of several cells, the first.

    Args:
        waiting: at least one cell.
        read: the data that the process has read, the last ones at the end.
        busy: the data of the cells that run in other processes.
    """

    def preferred(job: CellJob) -> tuple[bool, int]:
        data = data_of(job)
        return data in busy, -read.index(data) if data in read else 1

    return min(waiting, key=preferred)


def _run(wave: Sequence[CellJob], pool: Sequence[Worker], ticks: Any, on_event: OnEvent) -> list[CellJob]:
    """Run cells in the processes of the pool; returns those whose process died."""
    waiting, lost = list(wave), list[CellJob]()
    at: dict[Future[CellResult], tuple[Worker, CellJob]] = {}
    free = list(pool)
    while waiting or at:
        while waiting and free:
            worker = free.pop(0)
            job = next_cell(waiting, worker.read, {data_of(j) for _, j in at.values()})
            waiting.remove(job)
            at[worker.begin(job)] = worker, job
        done, _ = wait(at, timeout=0.2, return_when=FIRST_COMPLETED)
        for tick in _drain(ticks):
            on_event(tick)
        for future in done:
            worker, job = at.pop(future)
            free.append(worker)
            try:
                on_event(future.result())
            except BrokenProcessPool:
                worker.end()
                lost.append(job)
    return lost


@contextmanager
def _workers(n: int) -> Iterator[tuple[list[Worker], Any]]:
    """Processes, and the queue through which they report their steps."""
    server.start()
    ticks = mp.get_context(server.METHOD).Queue()
    pool = [Worker(ticks) for _ in range(n)]
    try:
        yield pool, ticks
    finally:
        for worker in pool:
            worker.end()


def _drain(ticks: Any) -> list[Tick]:
    drained = []
    while True:
        try:
            drained.append(ticks.get_nowait())
        except Empty:
            return drained
