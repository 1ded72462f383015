"""A run folder that came from somebody else: it is read and shown, nothing in it runs, nothing outside is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cwdpo.config import code_names, load_recipe, parse_recipe, stored_model
from cwdpo.data.images import CHECK_LEVELS
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import open_source
from cwdpo.errors import DataError, RecipeError
from cwdpo.evaluation.run import model_settings
from cwdpo.pipeline.resume import recipe_changes
from cwdpo.records import ImageRef
from cwdpo.report._text import picture_uri

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
    assert (done.code, "loads no code: read that code first" in done.err) == (1, True)
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
    assert f"{name}: is a link; a run folder may contain plain files and folders only" in done.err
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


# --- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg"])
def test_a_postscript_file_starts_no_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Pillow would hand it to ``gs``, whatever the file is called."""
    mark = tmp_path / "bin" / "ran"
    (tmp_path / "bin").mkdir()
    gs = tmp_path / "bin" / "gs"
    gs.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\ntouch {mark}\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    row = {"image": name, "prompt": "Q", "chosen": "a", "rejected": "b"}
    (data / "t.jsonl").write_text(json.dumps(row) + "\n")
    for check in CHECK_LEVELS[2:]:
        with pytest.raises(DataError, match="is not an image that"):
            read_examples(data / "t.jsonl", check_images=check)
    ref = ImageRef(path=data / name)
    with pytest.raises(OSError, match="cannot identify image file"):
        ref.open()
    assert not ref.is_altered()
    assert picture_uri(str(data / name), tmp_path) is None
    with Image.open(data / name) as image, pytest.raises(subprocess.CalledProcessError):  # else
        image.load()
    assert mark.exists()


def test_the_usual_formats_are_read(tmp_path: Path) -> None:
    picture = Image.effect_noise((16, 16), 60).convert("RGB")
    for name in ("jpg", "png", "gif", "webp", "bmp", "tiff", "ppm", "jp2", "avif", "ico", "tga"):
        picture.save(tmp_path / f"a.{name}")
        assert ImageRef(path=tmp_path / f"a.{name}").open().size == (16, 16), name


# --- data sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["saved", "parquet"])
@pytest.mark.parametrize("depth", ["column", "list", "blocks"])
def test_no_feature_at_any_depth_opens_a_file_or_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str, store: str
) -> None:
    import datasets

    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    places = [str(tmp_path / "outside.png"), "http://127.0.0.1:9/x.png"]
    image = datasets.Image()
    features: Any = {"column": image, "list": [image], "blocks": [{"content": [{"image": image}]}]}[depth]
    (tmp_path / "data").mkdir()
    cells = [{"bytes": None, "path": p} for p in places]
    values: Any = {
        "column": cells, "list": [[c] for c in cells], "blocks": [[{"content": [{"image": c}]}] for c in cells],
    }[depth]  # fmt: skip
    text = datasets.Value("string")
    made = datasets.Dataset.from_dict(
        {"x": values, "prompt": ["Q", "Q"], "chosen": ["a", "b"], "rejected": ["c", "d"]},
        features=datasets.Features({"x": features, "prompt": text, "chosen": text, "rejected": text}),
    )
    where = tmp_path / "data" / ("s" if store == "saved" else "s.parquet")
    # Saving would read the pictures and put them inside; a stranger's tool need not.
    monkeypatch.setattr("datasets.arrow_dataset.xgetsize", lambda *_, **__: 1)
    monkeypatch.setattr("datasets.arrow_writer.embed_table_storage", lambda table, **_: table)
    made.save_to_disk(where) if store == "saved" else pq.write_table(made.data.table, where)
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "socket.connect", "socket.getaddrinfo"):
            opened.append(f"{event} {arguments}")

    watching = True
    sys.addaudithook(watch)
    try:
        rows = [raw.value for raw in open_source(where).rows()]
    finally:
        watching = False
    assert len(rows) == 2
    assert not [o for o in opened if "outside.png" in o or "127.0.0.1" in o or "socket" in o]
    assert places[0] in json.dumps(rows[0])
