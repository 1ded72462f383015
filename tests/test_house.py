"""The walls of the house: who may import whom, what stays light, and how long things may get."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cwdpo
from cwdpo.objectives.base import OBJECTIVES
from paths import ROOT

PACKAGE = Path(cwdpo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"clock", "versions", "errors", "files", "hub", "records", "registry"}
MODELLING = {
    *BASE,
    "worlds",
    "objectives",
    "negatives",
    "data",
    "models",
    "scoring",
    "config",
    "rundir",
    "completions_api",
    "remote",
    "waiting",
}
DYNAMICS = {"dynamics", "curriculum"}
RUNNING = {*MODELLING, *DYNAMICS, "probes", "judging", "stage", "trainer"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "clock": set(),
    "versions": set(),
    "waiting": {"errors"},
    "copies": {"errors", "files", "waiting"},
    "registry": {"errors", "files"},
    "files": {"errors"},
    "hub": {"errors"},
    "hints": set(),
    "arguments": {"errors", "files", "registry"},
    "data_settings": {"records", "registry", "worlds"},
    "overrides": {"errors", "files"},
    "records": {"errors"},
    "worlds": BASE,
    "objectives": BASE,
    "rundir": {"errors", "files", "records", "versions"},
    "shipped": {"errors"},
    "connection": set(),
    "servers": set(),
    "completions_api": {*BASE},
    "remote": {*BASE, "completions_api", "connection", "servers"},
    "negatives": {*BASE, "completions_api", "remote", "judging.base"},
    "videos": {"errors", "records"},
    "data": {*BASE, "videos"},
    "models": {*BASE, "arguments", "data", "waiting"},
    "scoring": {*BASE, "data", "objectives", "models"},
    "curriculum": BASE,
    "probes": {*BASE, "objectives"},
    "dynamics": {*BASE, "rundir", "curriculum", "probes"},
    "config": {
        *BASE,
        "shipped",
        "arguments",
        "data_settings",
        "hints",
        "objectives",
        "overrides",
        "negatives",
        "judging.base",
        "models.settings",
        "worlds",
        "dynamics",
        "curriculum",
    },
    "schema": {"config", "judging.base", "objectives", "registry"},
    "metrics": {*BASE, "worlds"},
    "judging": {*BASE, "worlds", "completions_api", "remote", "rundir", "metrics", "models.reward"},
    "trainer": {*BASE, "arguments", "data", "models", "scoring", "objectives", "rundir", "waiting"},
    "stage": {*MODELLING, "arguments", "data_settings", "trainer"},
    "monitor": RUNNING,
    "onpolicy": {*RUNNING, "monitor"},
    "report": {"rundir", "errors", "files", "hub", "records", "videos", "dynamics"},
    "pipeline": {
        *RUNNING,
        "arguments",
        "copies",
        "data_settings",
        "overrides",
        "monitor",
        "onpolicy",
        "report.render",
        "report.model_card",
    },
    "evaluation": {*MODELLING, "metrics", "judging"},
    "lab": {*RUNNING, "monitor", "onpolicy", "pipeline", "metrics", "evaluation", "report"},
    "cli": {
        *RUNNING,
        "arguments",
        "data_settings",
        "monitor",
        "onpolicy",
        "pipeline",
        "metrics",
        "evaluation",
        "report",
        "lab",
        "schema",
        "shipped",
    },
    "__main__": {"cli"},
    "__init__": set(),  # its names are resolved on first use
}
FOR_TYPES_ONLY: dict[str, set[str]] = {"__init__": {"config", "pipeline"}}

HEAVY_USERS = (
    "models/",
    "stage/",
    "trainer/",
    "monitor/",
    "onpolicy/",
    "pipeline/",
    "lab/grid.py",
    "lab/bench/",
)
WITHOUT_TORCH = {
    *BASE, *DYNAMICS, "videos", "connection", "servers", "completions_api", "remote", "worlds", "objectives",
    "negatives", "config", "rundir", "metrics", "shipped", "judging", "overrides", "report", "schema", "cli",
}  # fmt: skip
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MANY_ARGUMENTS, MOST_ARGUMENTS = 6, 8
FEW_ARGUMENTS = {"pipeline", "monitor", "onpolicy", "trainer", "stage"}
"""Rooms whose functions take an object for what travels together."""


class Import(NamedTuple):
    module: str
    line: int
    for_types: bool


def imports(file: Path) -> list[Import]:
    """Every absolute module name that ``file`` imports, those inside functions included."""
    found: list[Import] = []

    def walk(node: ast.AST, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write absolute imports"
            # `from cwdpo import x` names a room too, so the names count as modules.
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "cwdpo" else []
            found.extend(Import(name, node.lineno, for_types) for name in names or [str(node.module)])
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            inside = typing_only and child in getattr(node, "body", ())
            walk(child, for_types or inside)

    walk(ast.parse(file.read_text(encoding="utf-8")), False)
    return found


def room_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def ours(file: Path) -> Iterator[tuple[str, Import]]:
    """Imports of our own modules, named without the package."""
    for item in imports(file):
        if item.module.split(".")[0] == "cwdpo":
            yield item.module.removeprefix("cwdpo").removeprefix("."), item


def within(module: str, allowed: set[str]) -> bool:
    return any(module == a or module.startswith(a + ".") for a in allowed)


def where(file: Path, line: int) -> str:
    return f"{file.relative_to(PACKAGE)}:{line}"


# --- (a) downward only ----------------------------------------------------------------------------------


def test_every_room_is_in_the_table() -> None:
    assert FILES
    assert {room_of(file) for file in FILES} <= set(ALLOWED)


def test_imports_go_downward_only() -> None:
    wrong = []
    for file in FILES:
        room = room_of(file)
        for module, item in ours(file):
            allowed = ALLOWED[room] | {room}
            if item.for_types:
                allowed = allowed | FOR_TYPES_ONLY.get(room, set())
            if not within(module, allowed):
                wrong.append(f"{where(file, item.line)}: {room} may not import {item.module}")
    assert not wrong, "\n".join(wrong)


def test_nothing_private_crosses_a_wall() -> None:
    """A module with an underscore belongs to its folder; the laboratory belongs to the command line."""
    wrong = []
    for file in FILES:
        for module, item in ours(file):
            *folder, name = module.split(".")
            if name.startswith("_") and folder != list(file.relative_to(PACKAGE).parts[:-1]):
                wrong.append(f"{where(file, item.line)}: {item.module} is private to its folder")
            if folder[:1] == ["lab"] and room_of(file) not in ("lab", "cli"):
                wrong.append(f"{where(file, item.line)}: the laboratory is for the command line only")
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_has_no_cycle() -> None:
    """Where two rooms may import each other, nothing is 'down' any more."""
    order: list[str] = []

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join((*path, room))
        if room not in order:
            for below in ALLOWED[room]:
                visit(below.split(".")[0], (*path, room))
            order.append(room)

    for room in ALLOWED:
        visit(room, ())
    assert set(order) == set(ALLOWED)


def test_the_walk_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import cwdpo.a\nfrom cwdpo import b\nif TYPE_CHECKING:\n    from cwdpo.c import x\nelse:\n    import d\n"
        "def f():\n    try:\n        from transformers.utils import logging\n    except ImportError: ...\n"
    )
    assert [(i.module, i.for_types) for i in imports(file)] == [
        ("cwdpo.a", False), ("cwdpo.b", False), ("cwdpo.c", True), ("d", False),
        ("transformers.utils", False),
    ]  # fmt: skip


def test_heavy_packages_stay_in_their_rooms() -> None:
    wrong = []
    for file in FILES:
        place = file.relative_to(PACKAGE).as_posix()
        for item in imports(file):
            package = item.module.split(".")[0]
            if package in ("transformers", "peft") and not place.startswith(HEAVY_USERS):
                wrong.append(f"{where(file, item.line)}: {item.module}")
            if package == "trl" and not place.startswith("lab/bench/"):
                wrong.append(f"{where(file, item.line)}: trl is for tests and benchmarks only")
            if package == "ray":
                wrong.append(f"{where(file, item.line)}: ray is optional: onpolicy/on_ray.py asks for it")
            if package == "torch" and not item.for_types and room_of(file) in WITHOUT_TORCH:
                wrong.append(f"{where(file, item.line)}: no torch here")
    assert not wrong, "\n".join(wrong)


def test_the_public_names_have_a_home() -> None:
    for name, module in cwdpo._LAZY.items():
        assert importlib.util.find_spec(module), f"cwdpo.{name}: there is no {module}"
    assert set(cwdpo.__all__) == {*cwdpo._LAZY, "__version__"}
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = cwdpo.nothing_here


# --- (b) light things stay light ------------------------------------------------------------------------

COMMAND = """
import runpy
sys.argv = ["cwdpo", *{arguments!r}]
try:
    runpy.run_module("cwdpo", run_name="__main__")
except SystemExit as exit:
    assert not exit.code, exit.code
"""

JUDGED_RECIPES = """
from cwdpo.config import parse_recipe
from cwdpo.judging.base import JUDGES
server = {"base_url": "http://x/v1", "model": "m"}
needs = {"metric": {"metric": "bleu4"}, "reward_model": {"path": "x"}, "vlm": {"server": server}}
for name in ("auto", "none", *JUDGES.names()):
    parse_recipe({"data": {"path": "x"}, "negatives": {"judge": {"name": name, **needs.get(name, {})}}})
"""


@pytest.mark.parametrize(
    "code",
    [
        "import cwdpo",
        "from cwdpo.config import parse_recipe; parse_recipe({'data': {'path': 'x'}, 'stop': ['kl > 1']})",
        "import cwdpo.data.read.reader",
        "import cwdpo.report.render",
        JUDGED_RECIPES,
        COMMAND.format(arguments=["--help"]),
        COMMAND.format(arguments=["train", "--help"]),
        COMMAND.format(arguments=["recipe", "schema"]),
    ],
    ids=["package", "config", "read", "render", "judges", "help", "train-help", "schema"],
)
def test_loads_neither_torch_nor_transformers(code: str) -> None:
    probe = (
        f"import sys\n{code}\n"
        "print('loaded:', *(m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


# --- (d) sizes and traces -------------------------------------------------------------------------------


def test_files_stay_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {file.name: n for file, n in lengths.items() if n >= MAX_FILE_LINES}


def test_functions_stay_short() -> None:
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{where(file, node.lineno)}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_what_travels_together_is_an_object() -> None:
    many: dict[str, int] = {}
    for file in FILES:
        if room_of(file) not in FEW_ARGUMENTS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                names = [a.arg for a in given if a.arg not in ("self", "cls")]
                if len(names) > MANY_ARGUMENTS:
                    many[f"{where(file, node.lineno)}: {node.name}"] = len(names)
    assert len(many) <= 5, many
    assert max(many.values(), default=0) <= MOST_ARGUMENTS, many


def test_no_general_code_knows_an_objective_by_class() -> None:
    """What a loss needs is asked of :class:`Objective`; an objective of a user's own can do what a shipped one can."""
    classes = "|".join(OBJECTIVES.get(name).__name__ for name in OBJECTIVES.names())
    pattern = re.compile(rf"isinstance\([^)]*\b({classes})\b")
    wrong = [
        f"{file.relative_to(PACKAGE)}: {match[0]})"
        for file in FILES
        if room_of(file) != "objectives"
        for match in pattern.finditer(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def tracked_files() -> list[Path]:
    """The files that git has or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_path_of_a_machine_is_written_anywhere() -> None:
    traces = [b"/" + word + b"/" for word in (b"work", b"tmp")]
    found = [
        f"{path.relative_to(ROOT)}: {trace.decode()}"
        for path in tracked_files()
        for trace in traces
        if trace in path.read_bytes()
    ]
    assert not found, "\n".join(found)
