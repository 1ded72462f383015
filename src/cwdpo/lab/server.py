"""The process that the workers of a study are forked from. Imports nothing heavy, so that it can be started first."""

from __future__ import annotations

import multiprocessing as mp

METHOD = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"  # Windows has no fork
IMPORTED = ("cwdpo.lab.grid", "torchmetrics.functional.classification", "transformers.models.llava")
"""What the process imports, once for all workers."""


def start() -> None:
    """Start the process, if it does not run yet. It imports while this one goes on, and ends with it."""
    if METHOD == "forkserver":
        from multiprocessing import forkserver

        mp.set_forkserver_preload(list(IMPORTED))
        forkserver.ensure_running()
