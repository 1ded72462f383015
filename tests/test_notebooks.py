"""Every notebook runs as it stands; where it names a model and data of the hub, small local ones stand in by its own
environment variables."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from cwdpo.config import load_recipe
from paths import ROOT

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Run a notebook in a folder; what its cells print and show, by the id of the cell."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = read(name)
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return {
        cell.id: "".join(
            out.get("text", "") + "".join(f"\n{kind}\n{data}" for kind, data in out.get("data", {}).items())
            for out in cell.outputs
        )
        for cell in book.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_installs_only_what_is_missing(path: Path) -> None:
    book = read(path.stem)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert 'if importlib.util.find_spec("cwdpo") is None:' in code[0].source
    assert not any("pip install" in cell.source for cell in code[1:])
    assert {"kernelspec", "language_info"} == set(book.metadata)


@pytest.mark.slow
def test_the_notebook_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = executed("embedded_model", tmp_path, monkeypatch)
    assert said["install"] == ""
    assert "image/png" in said["plot"]
    table = {line.split()[0]: line.split()[1:] for line in said["table"].splitlines()[1:]}
    cooled, dpo = map(float, table["margin"])
    assert 0 < cooled < dpo, "the text says so"
    assert "srcdoc" in said["show_report"]
    assert all(name in said["ask_run"] for name in ("base", "stage 1", "final"))


@pytest.mark.slow
def test_the_notebook_for_a_model_of_your_own(
    tmp_path: Path, model_folder: Path, world_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world_folder / "images", tmp_path / "images")
    lines = (world_folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    monkeypatch.setenv("CWDPO_MODEL", str(model_folder))
    monkeypatch.setenv("CWDPO_DATA", "data.jsonl")
    said = executed("your_model", tmp_path, monkeypatch)
    assert str(model_folder) in said["choose"]
    recipe = load_recipe(tmp_path / "runs" / "mine" / "recipe.yaml")
    assert (recipe.model.path, recipe.model.dtype, recipe.train.bf16) == (str(model_folder), "float32", False)
    assert "24 usable" in said["init_run"]
    assert said["readings"].startswith("margin ")
    assert "image/png" in said["image"]
    assert all(name in said["ask_run"] for name in ("base", "stage 1", "final"))
    assert "compared with the trained policy" in said["export_run"]
    assert not any("FutureWarning" in text for text in said.values())
    assert (tmp_path / "exported" / "model.safetensors").is_file()
