"""Starts a run of several processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from process_worker import shard_on_cpu
from cwdpo.pipeline.two_stage import train_two_stage
if sys.argv[4] == "fsdp2":
    shard_on_cpu()
train_two_stage(sys.argv[1], sys.argv[2])
torch.distributed.destroy_process_group()
"""


def launch(folder: Path, file: Path, world: int, mode: str) -> None:
    """Start a run as a launcher would."""
    together(
        [sys.executable, "-c", WORKER, str(file), str(folder), str(Path(__file__).parent), mode], world=world
    )


def together(command: Sequence[str], *, world: int = 2, codes: Sequence[int] | None = None) -> list[str]:
    """Start a command in several processes as a launcher would; none outlives ten minutes, of four processes twenty.

    Args:
        command: the same for all.
        world: number of processes.
        codes: the exit code that each must have; default: 0.

    Returns:
        What each printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with ExitStack() as open_files:
        # Not pipes: a full one would stop a process that the others wait for.
        files = [open_files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        started = [
            subprocess.Popen(
                command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=file, stderr=file
            )
            for r, file in enumerate(files)
        ]
        try:
            for process in started:
                process.wait(300 * world)
        finally:
            for process in started:
                process.kill()
                process.wait()
            for file in files:
                file.seek(0)
            said = [file.read() for file in files]
    assert [p.returncode for p in started] == list(codes or [0] * world), "\n".join(t[-3000:] for t in said)
    return said
