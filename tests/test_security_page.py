"""docs/security.md promises only what a test tries: every named test exists, and every promise names one."""

from __future__ import annotations

import ast
import re

import pytest

from paths import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`")


def promises() -> list[str]:
    part = PAGE.split("## Promises and their tests")[1].split("\n## ")[0]
    return [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| promise")]


def test_every_promise_names_a_test() -> None:
    assert len(promises()) > 20
    without = [line for line in promises() if not NAMED.search(line.rpartition(" | ")[2])]
    assert not without, without


@pytest.mark.parametrize(("file", "name", "case"), sorted(set(NAMED.findall(PAGE))))
def test_the_named_test_exists(file: str, name: str, case: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{file} has no {name}"
    assert not case or f'"{case}"' in text, f"{file} has no case {case}"
