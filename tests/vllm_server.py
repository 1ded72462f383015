"""A vLLM process on this machine, which can be killed and started again."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from server import free_port

PYTHON = os.environ.get("CWDPO_VLLM")
"""The python of the environment that has vLLM; ``make test-serving`` sets it."""
LIMIT = 300.0
"""Seconds after which a start counts as stuck."""


class Vllm:
    """A server of a folder, which can be killed and started again under the same address."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log, self.port = folder, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        assert PYTHON
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
        own |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        # The command `vllm` asks for the metadata of a package of that name, which vllm-cpu is not.
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder), "--served-model-name",
            "base", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--enable-lora",
            "--max-lora-rank", "16", "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                command, env={**kept, **own}, stdout=file, stderr=file, start_new_session=True
            )
        end = time.monotonic() + LIMIT
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail("vLLM did not start: " + self.log.read_text(errors="replace")[-3000:])
            time.sleep(1)

    def answers(self) -> bool:
        """Whether it answers a request for its models."""
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """Kill it with all of its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
