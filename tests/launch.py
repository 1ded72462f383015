"""Starts a run of several processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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
    """Start a run as a launcher would; no process outlives five minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", WORKER, str(file), str(folder), str(Path(__file__).parent), mode]
    started = [
        subprocess.Popen(
            command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for r in range(world)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=300)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0] * world, "\n".join(text[-3000:] for text in said)
