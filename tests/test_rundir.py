"""A run folder: nothing is overwritten by accident, and a kill at any moment leaves it readable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cwdpo import versions
from cwdpo.errors import CwdpoError, FileError, RunDirError
from cwdpo.files import writing
from cwdpo.files.reading import read_jsonl
from cwdpo.files.writing import write_json, write_text
from cwdpo.records import Reading
from cwdpo.rundir import RunDir


def row(stage: str, step: int) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": 0.5}


# --- creating and opening -------------------------------------------------------------------------------


def test_an_existing_run_is_only_continued_when_asked(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "deep" / "run").create()
    assert run.path.is_dir()
    run.create()  # a folder without a recipe is no run yet
    write_text(run.path / "recipe.yaml", "name: a\n")
    write_text(run.path / "problems.jsonl", "{}\n")
    run.create()  # nothing was trained: a start that failed on its data may simply be repeated
    assert not (run.path / "problems.jsonl").exists()
    write_text(run.path / "metrics.jsonl", "{}\n")
    with pytest.raises(RunDirError, match=r"run already contains a run: continue it with --resume"):
        RunDir(run.path).create()
    assert RunDir(run.path).create(resume=True).path == run.path
    assert (run.path / "recipe.yaml").read_text() == "name: a\n"


def test_the_error_is_ours_and_a_file_exists_error() -> None:
    assert issubclass(RunDirError, CwdpoError)
    assert issubclass(RunDirError, FileExistsError)


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json"])
def test_open_wants_a_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunDirError, match="no run here"):
        RunDir.open(tmp_path)
    with pytest.raises(RunDirError, match="absent: no run here"):
        RunDir.open(tmp_path / "absent")
    (tmp_path / name).write_text("{}")
    assert RunDir.open(str(tmp_path)).path == tmp_path


# --- writing --------------------------------------------------------------------------------------------


def test_write_text_makes_folders_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one\n")
    write_text(path, "zwei – 二\n")
    assert path.read_text(encoding="utf-8") == "zwei – 二\n"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "b.txt"
    write_text(path, "old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writing.os, failing, full)
        with pytest.raises(OSError, match="no space left"):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["b.txt"]


def test_the_text_is_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        calls.append("sync")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        calls.append(f"{Path(source).read_text()} -> {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(writing.os, "fsync", sync)
    monkeypatch.setattr(writing.os, "replace", replace)
    write_text(tmp_path / "b.txt", "whole")
    assert calls == ["sync", "whole -> b.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_json_that_no_other_reader_takes_is_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunDir(tmp_path).append("x.jsonl", [{"value": value}])
    assert json.loads(path.read_text()) == {"old": 1}
    assert read_jsonl(tmp_path / "x.jsonl") == []


def test_json_is_read_back_and_an_absent_file_is_empty(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": "é", "value": None})
    assert RunDir(tmp_path).json("x.json") == {"name": "é", "value": None}
    assert RunDir(tmp_path).json("y.json") == {}
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_the_environment_names_versions(tmp_path: Path) -> None:
    RunDir(tmp_path).write_environment()
    environment = RunDir(tmp_path).json("environment.json")
    assert set(environment["packages"]) == set(versions.PACKAGES)
    assert environment["packages"]["numpy"][0].isdigit()
    assert set(environment) == {"packages", "python", "platform", "command"}


# --- rows -----------------------------------------------------------------------------------------------


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.metrics() == run.readings() == run.samples() == []
    run.append("metrics.jsonl", [row("stage1", 1)])
    run.append("metrics.jsonl", [row("stage1", 2), {"text": 'a\nb "c" é'}])
    assert run.metrics() == [row("stage1", 1), row("stage1", 2), {"text": 'a\nb "c" é'}]
    run.append("samples.jsonl", [{"id": "1"}])
    assert run.samples() == [{"id": "1"}]


def test_readings_keep_their_fields(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append_readings("stage2", [Reading("probe/chosen", None, 0, "nats", 5, "validation")])
    assert run.readings() == [
        {"stage": "stage2", "name": "probe/chosen", "value": None, "n": 0, "unit": "nats", "step": 5,
         "split": "validation", "low": None, "high": None}
    ]  # fmt: skip
    run.append_readings("stage2", [Reading("kl", float("nan"), 3, low=float("-inf"), high=1.0)])
    assert [run.readings()[1][k] for k in ("value", "low", "high")] == [None, None, 1.0]


def test_a_last_line_cut_off_is_left_out_and_a_broken_one_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(FileError, match=r"metrics\.jsonl: line 2: is not JSON"):
        read_jsonl(path)
    path.write_text("")
    assert read_jsonl(path) == []


def test_a_cut_inside_a_character_is_a_cut_line_too(tmp_path: Path) -> None:
    # DEFECT: read_jsonl decodes the whole file at once, and UnicodeDecodeError escapes.
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n{"text": "caf' + "é".encode()[:1])
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u200b"])
def test_any_text_of_a_model_survives(tmp_path: Path, separator: str) -> None:
    # DEFECT: read_jsonl uses str.splitlines, which also splits at U+2028, U+2029 and U+0085.
    run = RunDir(tmp_path)
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    run.append("samples.jsonl", rows)
    assert run.samples() == rows


def test_rows_appended_after_a_cut_line_are_not_lost(tmp_path: Path) -> None:
    # DEFECT: a resumed run appends its first row to the cut line, which breaks both.
    run = RunDir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "stage1", "step": 1}\n{"stage": "sta')
    run.drop_after("stage1", 1)
    run.append("metrics.jsonl", [row("stage1", 2), row("stage1", 3)])
    assert [r["step"] for r in run.metrics()] == [1, 2, 3]


def test_drop_after_cuts_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    metrics = [row("stage1", 10), row("stage1", 20), row("stage2", 5), row("stage2", 10), {"step": 99}]
    run.append("metrics.jsonl", metrics)
    readings = [Reading("a", 1.0, 3, step=step) for step in (0, 5, 10)]
    run.append_readings("stage1", readings)
    run.append_readings("stage2", readings)
    run.append("samples.jsonl", [row("stage2", 10)])
    run.drop_after("stage2", 5)
    assert run.metrics() == [row("stage1", 10), row("stage1", 20), row("stage2", 5), {"step": 99}]
    assert [(r["stage"], r["step"]) for r in run.readings()] == [
        ("stage1", 0), ("stage1", 5), ("stage1", 10), ("stage2", 0), ("stage2", 5),
    ]  # fmt: skip
    assert run.samples() == [row("stage2", 10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "readings.jsonl", "samples.jsonl"]


def test_drop_after_without_files_writes_none(tmp_path: Path) -> None:
    RunDir(tmp_path).drop_after("stage1", 0)
    assert list(tmp_path.iterdir()) == []
