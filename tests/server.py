"""A real `transformers serve` process that holds the embedded small LLaVA."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwdpo.models.load import EMBEDDED

ABSENT = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(
    bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (pip install 'cwdpo[dev]')"
)
LIMIT = 240.0
"""Seconds after which the server counts as stuck."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that holds the embedded small LLaVA."""
    home, port = tmp_path_factory.mktemp("hub"), free_port()
    (home / "hub").mkdir()
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(EMBEDDED), "--device", "cpu", "--host",
        "127.0.0.1", "--port", str(port), "--log-level", "info",
    ]  # fmt: skip
    said: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        patience = threading.Timer(LIMIT, server.kill)
        patience.start()
        assert server.stdout is not None
        for line in server.stdout:
            said.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            pytest.fail("the server ended: " + "".join(said)[-3000:])
        drain = threading.Thread(target=lambda: said.extend(server.stdout or ()))
        drain.start()
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()
        drain.join(30)
        patience.cancel()
