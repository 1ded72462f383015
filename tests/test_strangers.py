"""A run folder that came from somebody else: it is read and shown, nothing in it runs, nothing outside is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import code_names, load_recipe, parse_recipe, stored_model
from cwdpo.errors import RecipeError
from cwdpo.evaluation.run import model_settings
from cwdpo.pipeline.resume import recipe_changes

Run = Callable[..., Any]
EVIL = "from pathlib import Path\nPath({mark!r}).write_text('it ran')\nclass X: ...\n"


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A run folder whose recipe names code that lies beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    (folder / "recipe.yaml").write_text(
        f"data: {{path: x.jsonl}}\nstage2: {{objective: {{name: {folder}/evil.py:X}}, learning_rate: 1e-5}}\n"
    )
    (folder / "environment.json").write_text("{}")
    return folder


# --- stored recipes -------------------------------------------------------------------------------------


def test_the_file_would_run_if_it_were_asked_for(stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):  # X is no objective
        parse_recipe(
            {"data": {"path": "x"}, "stage2": {"objective": f"{stranger}/evil.py:X", "learning_rate": 1}}
        )
    assert (tmp_path / "mark").is_file()


def test_a_stored_recipe_loads_no_code_and_names_it(stranger: Path, tmp_path: Path) -> None:
    path = stranger / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"recipe\.yaml: stage2\.objective\.name names code, .*evil\.py:X"):
        load_recipe(path)
    for name in ("recipe.1.yaml", "mine.yaml"):  # whatever it is called there
        (stranger / name).write_text(path.read_text())
        with pytest.raises(RecipeError, match="names code"):
            load_recipe(stranger / name)
    changed = recipe_changes(path, parse_recipe({"data": {"path": "x.jsonl"}}))
    assert changed["stage2.objective.name"] == (f"{stranger}/evil.py:X", "cw_dpo")
    assert stored_model(path).path == "embedded"
    (stranger / "model").mkdir()
    assert model_settings(str(stranger)).path == str(stranger / "model")
    assert not (tmp_path / "mark").exists()


def test_code_that_the_command_line_names_is_loaded(stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no class 'X' derived from"):
        load_recipe(stranger / "recipe.yaml", [f"stage2.objective.name={stranger}/evil.py:X"])
    assert (tmp_path / "mark").is_file()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("negatives: {mix: {a.py:X: 1.0}}", "negatives.mix.a.py:X"),
        ("negatives: {judge: {name: a.py:X}}", "negatives.judge.name"),
        ("data: {path: x, format: a.py:X}", "data.format"),
        ("probes: {extra: [a.py:X]}", "probes.extra[0]"),
        ("curriculum: a.py:X", "curriculum"),
        ("stage1: {objective: a.py:X}", "stage1.objective"),
        ("stage1: {objective: {name: [a.py:X]}}", "stage1.objective.name[0]"),
        ("stage1: {objective: {name: !!binary YS5weTpY}}", "stage1.objective.name"),
    ],
)
def test_every_place_of_a_component_is_looked_at(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(
        f"{text}\n" + ("" if text.startswith("data") else "data: {path: x}\n")
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert f"recipe.yaml: {key} names code, " in str(caught.value)


def test_no_name_of_code_means_none() -> None:
    assert code_names({"data": {"path": "a.py"}, "stop": ["kl > 1"], "seed": 3, "x": None}) == {}


def test_resume_and_export_run_nothing_of_the_folder(run: Run, stranger: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("data: {path: x.jsonl}\n")
    done = run("train", own, "--out", stranger, "--resume")
    assert (done.code, "stage2.objective.name" in done.err) == (1, True)
    done = run("train", stranger / "recipe.yaml", "--out", stranger, "--resume")
    assert (done.code, "loads none: read that file first" in done.err) == (1, True)
    done = run("export", stranger, "--merge", "--out", tmp_path / "out")
    assert (done.code, "no final model yet" in done.err) == (1, True)
    assert not (tmp_path / "mark").exists()


# --- links ----------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("data: {path: x.jsonl}\n")
    (folder / "metrics.jsonl").write_text("")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        ".report.html.tmp",
        "report.html",
        ".lock",
        "metrics.jsonl",
        ".x.tmp",
        "summary.json",
        "stage1",
        "model/x",
    ],
)
@pytest.mark.parametrize("command", ["report", "diagnose", "watch", "resume", "export"])
def test_a_link_in_a_run_folder_is_named_and_leads_nowhere(
    run: Run, plain: Path, tmp_path: Path, name: str, command: str
) -> None:
    outside = tmp_path / "outside"
    if name in ("stage1", ".x.tmp"):
        outside.mkdir()
        (outside / "a").write_text("precious")
    else:
        outside.write_text("precious")
    (plain / name).parent.mkdir(exist_ok=True)
    (plain / name).unlink(missing_ok=True)
    (plain / name).symlink_to(outside)
    arguments = {
        "resume": ("train", plain / "recipe.yaml", "--out", plain, "--resume"),
        "export": ("export", plain, "--out", tmp_path / "out"),
    }
    done = run(*arguments.get(command, (command, plain)))
    assert done.code == 1, done
    assert f"{name}: is a link; a run folder holds plain files and folders only" in done.err
    assert len(done.err.strip().splitlines()) == 1
    kept = outside / "a" if outside.is_dir() else outside
    assert kept.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["outside", "plain"]


def test_a_run_folder_that_is_itself_a_link_is_the_users_own_choice(
    run: Run, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(plain)
    assert run("report", tmp_path / "other").code == 0
    assert (plain / "report.html").is_file()
