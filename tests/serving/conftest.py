"""A real vLLM on the CPU; tests here run under ``make test-serving`` only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cwdpo.models.load import load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.models.write import save_weights
from vllm_server import PYTHON, Vllm

collect_ignore_glob = [] if PYTHON else ["test_*.py"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded LLaVA as ``cwdpo export`` writes it."""
    folder = tmp_path_factory.mktemp("export") / "base"
    policy = load_policy(ModelSettings(path="embedded", device="cpu"))
    save_weights(policy.model, folder)
    policy.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    server = Vllm(base, tmp_path_factory.mktemp("vllm") / "log")
    server.start()
    yield server
    server.kill()
