"""`cwdpo env` and `cwdpo --version`: enough for a bug report, and nothing secret."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch


def test_the_version(run: Callable[..., Any]) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"cwdpo {metadata.version('cwdpo')}\n")


def test_versions_devices_and_settings(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = json.loads(run("env", "--json").out)
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["openai"] == metadata.version("openai")
    assert found["system"]["python"][:2] == "3."
    assert found["devices"]["torch threads"] == torch.get_num_threads()
    assert found["settings"]["OMP_NUM_THREADS"] == "3"
    plain = run("env").out
    for part in ("packages:", "torch ", "devices:", "OMP_NUM_THREADS"):
        assert part in plain


def test_nothing_secret_is_shown(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MY_PASSWORD",
        "HOME",
        "USER",
        "HTTPS_PROXY",
        "HF_HOME",
    ):
        monkeypatch.setenv(name, "s3cret-value")
    for arguments in (("env",), ("env", "--json")):
        done = run(*arguments)
        assert done.code == 0
        assert "s3cret" not in done.out + done.err
        assert "API_KEY" not in done.out
