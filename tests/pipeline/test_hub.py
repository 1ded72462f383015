"""Pushing an export, against a stand-in for the hub's API on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cwdpo.errors import ServerError
from cwdpo.pipeline.hub import make_repository, push_folder
from fake_hub import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "exported"
    out.mkdir()
    (out / "README.md").write_text("---\nlibrary_name: transformers\n---\n# a\n")
    (out / "config.json").write_text("{}")
    (tmp_path / "report.html").write_text("<p>report</p>")
    return out


def test_a_folder_and_its_report_arrive(hub: Hub, folder: Path) -> None:
    name = make_repository("tuned", private=True)
    assert name == "me/tuned"
    address = push_folder(folder, name, folder.parent / "report.html")
    assert address == f"{hub.url}/me/tuned"
    assert hub.private == {"me/tuned": True}
    wanted = {path.name: path.read_bytes() for path in (*folder.iterdir(), folder.parent / "report.html")}
    assert hub.files == {"me/tuned": wanted}


@pytest.mark.parametrize(
    ("repository", "token", "offline", "said"),
    [
        ("tuned", "hf_wrong", False, r"HTTP 401\): log in with `hf auth login`"),
        (
            "other/tuned",
            "hf_right",
            False,
            r"HTTP 403\): log in with `hf auth login`, with a token that may write",
        ),
        ("a/b/c", "hf_right", False, "not an id of the hub: OWNER/NAME"),
        ("tuned", "hf_right", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, repository: str, token: str, offline: bool, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ServerError, match=f"--push {repository}: .*{said}") as error:
        make_repository(repository, private=False)
    assert "\n" not in str(error.value)
    assert token not in str(error.value)


def test_a_hub_that_is_not_there_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match="cannot be reached"):
        make_repository("tuned", private=False)


def test_the_command_asks_the_hub_before_it_loads_anything(hub: Hub, run: Any, tmp_path: Path) -> None:
    done = run("export", tmp_path, "--out", tmp_path / "out", "--push", "other/tuned")
    assert done.code == 1
    assert "--push other/tuned: the hub refuses it (HTTP 403)" in done.err
    assert "it needs --push" in run("export", tmp_path, "--out", tmp_path / "out", "--private").err
