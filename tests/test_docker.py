"""What the Dockerfiles name exists: files, extras, and versions as in the lock; nobody builds them here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from paths import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_dockerfile_names_exists(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= set(sent)
    (lock,) = (ROOT / name for name in copied if name.endswith("constraints.txt"))
    pinned = dict(line.split("==") for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line)
    named = dict(word.split("==") for word in re.findall(r"[a-z]+==[\d.]+", text))
    assert {name: pinned.get(name, version) for name, version in named.items()} == named
    assert named["torch"] == "2.13.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(asked.split(",")) <= set(extras)
