"""Runs cells in parallel processes and reports progress; a failed cell does not stop the others."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import Empty
from typing import Any

from cwdpo.files.writing import write_text
from cwdpo.lab.cell import CellJob, run_cell

Tick = tuple[str, str, int, int]
"""(cell key, stage, step, steps)."""

_ticks: Any = None


@dataclass(frozen=True)
class CellResult:
    """The figures of a finished cell, or the error of a failed one."""

    key: str
    status: str
    figures: dict[str, Any]
    error: str | None
    seconds: float


OnEvent = Callable[[Tick | CellResult], None]
Bar = Callable[[int], AbstractContextManager[OnEvent]]
"""Opens a progress display for a total number of optimizer steps; gives the callback for steps and finished cells."""


@contextmanager
def no_bar(steps: int) -> Iterator[OnEvent]:
    """Show no progress."""
    del steps
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

    for wave in waves:
        for job in wave:
            job.folder.mkdir(parents=True, exist_ok=True)
        if not _in_pool(wave, workers, note):
            # A worker died (killed, out of memory) and broke the pool. Run the remaining cells one by one, to find out
            # which one it was.
            for job in (j for j in wave if j.key not in results):
                if not _in_pool([job], 1, note):
                    note(CellResult(job.key, "failed", {}, "its process was killed; out of memory?", 0.0))
    return results


def _in_pool(wave: Sequence[CellJob], workers: int, on_event: OnEvent) -> bool:
    """Run cells in one pool of processes; ``False`` if the pool broke before all were done."""
    context = mp.get_context("spawn")
    ticks = context.Queue()
    size = max(1, min(workers, len(wave)))
    with ProcessPoolExecutor(size, mp_context=context, initializer=_prepare, initargs=(ticks,)) as pool:
        pending: set[Future[CellResult]] = {pool.submit(_work, job) for job in wave}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for tick in _drain(ticks):
                on_event(tick)
            for future in done:
                try:
                    on_event(future.result())
                except BrokenProcessPool:
                    return False
    return True


def _drain(ticks: Any) -> list[Tick]:
    drained = []
    while True:
        try:
            drained.append(ticks.get_nowait())
        except Empty:
            return drained
