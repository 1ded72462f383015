"""What a user installs: the wheel has every file, its metadata are valid, and it works without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from paths import ROOT

pytestmark = pytest.mark.slow
TYPED = """
from pathlib import Path

from cwdpo.config import Recipe, parse_recipe
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir

recipe: Recipe = parse_recipe({"data": {"path": "rows.jsonl"}, "stage2": {"objective": {"name": "cw_dpo"}}})
run: RunDir = train_two_stage(recipe, Path("runs/mine"))
margins: list[float] = [row["value"] for row in run.readings() if row["name"] == "margin"]
reveal_type(recipe.stage2.learning_rate)
"""


def tracked() -> list[str]:
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the tracked files, and the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel; dependencies come from the environment."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--root-user-action", "ignore", "--target", str(folder), str(built[0])], check=True)
    return folder


def cwdpo(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cwdpo", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_and_the_sdist_have_every_file(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        have = {name for name in archive.namelist() if name.startswith("cwdpo/")}
    package = {name.removeprefix("src/") for name in tracked() if name.startswith("src/cwdpo/")}
    assert have == package
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", *(f"src/{name}" for name in package)} <= names


def test_the_metadata_are_what_an_index_takes(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
    assert (metadata.name, str(metadata.version)) == ("cwdpo", version("cwdpo"))
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.license_expression == "Apache-2.0"
    extras = set(metadata.provides_extra or ())
    assert {"dev", "quant", "vision", "captions", "judge", "server", "trackers", "bf16"} <= extras


def test_a_run_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    where = "import cwdpo; print(cwdpo.__file__)"
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(installed)
    listed = cwdpo(installed, tmp_path, "recipe", "list")
    assert listed.returncode == 0, listed.stderr
    assert "tiny" in listed.stdout
    short = ["stage1.steps=1", "stage2.steps=1", "calibration.samples=4", "evaluation.prompts=2"]
    done = cwdpo(installed, tmp_path, "train", "tiny", "--out", "run", *short)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "report.html").is_file()
    done = cwdpo(installed, tmp_path, "diagnose", "run")
    assert done.returncode in (0, 3), done.stderr


def test_users_code_is_checked_with_our_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TYPED)
    env = {**os.environ, "MYPYPATH": str(installed)}
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", "own.py"]
    done = subprocess.run(mypy, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", "")
    (tmp_path / "own.py").write_text(TYPED + 'recipe.stage2.learning_rate = "high"\n')
    done = subprocess.run(mypy, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
