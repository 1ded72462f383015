"""A stand-in for the API of the Hugging Face Hub on loopback: pushes are kept, repositories are read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_REPOSITORY = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(/(?P<rest>.*))?")
_FILE = re.compile(r"(?P<kind>/datasets)?/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Hub(ThreadingHTTPServer):
    """Repositories with the files of their commits; those of ``other`` are not for this token.

    ``add`` puts a repository there to be read; ``gated`` ones are refused to every token; ``asked`` are the paths of
    requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []

    def add(self, kind: str, id: str, files: dict[str, bytes] | Path, revision: str = "main") -> None:
        """A revision of a repository: ``kind`` is ``models`` or ``datasets``, ``files`` a mapping or a folder."""
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in files.rglob("*") if f.is_file()}
        self.revisions.setdefault((kind, id), {})[revision] = files

    def commit(self, kind: str, id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The id of a commit and its files, by branch or by that id."""
        for name, files in self.revisions.get((kind, id), {}).items():
            sha = hashlib.sha1(f"{kind} {id} {name}".encode()).hexdigest()
            if revision in (name, sha):
                return sha, files
        return None


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if "/paths-info/" in self.path and (match := _REPOSITORY.fullmatch(unquote(self.path))):
            found = self.of(match["kind"], match["id"], str(match["rest"]).removeprefix("paths-info/"))
            wanted = parse_qs(body.decode()).get("paths", [])
            files = [] if found is None else listed(found[1])
            return None if found is None else self.reply(200, [f for f in files if f["path"] in wanted])
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
        self.server.asked.append(self.path)
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if path in ("/api/models", "/api/datasets"):
            kind, owner = path.removeprefix("/api/"), query["author"][0]
            ids = [id for known, id in self.server.revisions if known == kind]
            return self.reply(200, [{"id": id} for id in ids if id.startswith(f"{owner}/")])
        if match := _FILE.fullmatch(path):
            kind = "datasets" if match["kind"] else "models"
            return self.file(kind, match["id"], match["revision"], match["path"])
        if match := _REPOSITORY.fullmatch(path):
            return self.repository(match["kind"], match["id"], (match["rest"] or "").split("/"), query)
        return self.reply(404, {"error": f"no {self.path}"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def of(self, kind: str, id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit; where there is none, the answer that says so is sent."""
        found = self.server.commit(kind, id, revision)
        if (kind, id) not in self.server.revisions:
            self.reply(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif found is None:
            self.reply(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def repository(self, kind: str, id: str, rest: list[str], query: dict[str, list[str]]) -> None:
        what = rest[0]
        if what == "auth-check":
            if id in self.server.gated:
                return self.reply(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return self.reply(200, {})
        found = self.of(kind, id, rest[1] if what in ("revision", "tree") else "main")
        if found is None:
            return None
        sha, files = found
        if what == "tree":
            below = "/".join(rest[2:])
            inside = [one for one in listed(files) if not below or one["path"].startswith(f"{below}/")]
            if query.get("recursive", ["false"])[0].lower() != "true":
                depth = below.count("/") + 1 + bool(below) if below else 1
                inside = [one for one in inside if one["path"].count("/") < depth]
            return self.reply(200, inside)
        gated = "auto" if id in self.server.gated else False
        siblings = [{"rfilename": name} for name in files]
        return self.reply(200, {"id": id, "sha": sha, "siblings": siblings, "gated": gated, "tags": []})

    def file(self, kind: str, id: str, revision: str, path: str) -> None:
        found = self.of(kind, id, revision)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        return self.send(200, files[path], {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": sha})

    def reply(self, status: int, found: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(found).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def listed(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files and their folders, as the hub lists them."""
    folders = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
    found = [{"type": "directory", "path": name, "oid": digest(name.encode()), "size": 0} for name in folders]
    return found + [
        {"type": "file", "path": name, "oid": digest(data), "size": len(data)} for name, data in files.items()
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub of this test's process, with an empty cache."""
    import datasets
    from huggingface_hub import constants, hf_api

    from cwdpo import hub as ours

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    # These were made from the first ENDPOINT when the package was imported.
    template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("{endpoint}", server.url))
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    ours._known.cache_clear()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
