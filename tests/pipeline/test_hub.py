"""Pushing an export, against a stand-in for the hub's API on loopback."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cwdpo.errors import ServerError
from cwdpo.pipeline.hub import make_repository, push_folder


class Hub(ThreadingHTTPServer):
    """Repositories with the files of their commits; those of ``other`` are not for this token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            if owner == "other":
                return self.reply(403, {"error": "You don't have the rights to create a model under other"})
            name = f"{owner}/{asked['name']}"
            self.server.private.setdefault(name, asked.get("visibility") == "private")
            return self.reply(200, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.split("?")[0])
        if match is None:
            return self.reply(404, {"error": f"no {self.path}"})
        name, what = match.groups()
        if what == "preupload":
            each = {"uploadMode": "regular", "shouldIgnore": False}
            return self.reply(
                200, {"files": [{"path": f["path"], **each} for f in json.loads(body)["files"]]}
            )
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.files.setdefault(name, {})[entry["value"]["path"]] = content
        commit = {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1", "success": True}
        return self.reply(200, commit)

    def do_GET(self) -> None:
        self.reply(404, {"error": f"no {self.path}"})

    def reply(self, status: int, found: Any) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
