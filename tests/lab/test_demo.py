"""The comparison runner: its arithmetic, its honesty about failed cells, and a small whole demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo.lab import demo, methods
from cwdpo.lab.cell import spread, steps_to_share
from cwdpo.lab.grid import CellResult
from cwdpo.lab.spec import load_study
from cwdpo.lab.summary import compared
from cwdpo.lab.table import markdown, name_of, number


def test_spread_is_the_coefficient_of_variation() -> None:
    assert spread([1.0, 3.0]) == pytest.approx(0.5)
    assert spread([1.0]) is None


def test_steps_to_a_share_of_the_best_margin() -> None:
    readings = [
        {"name": "margin", "step": s, "value": v} for s, v in ((0, 0.0), (10, 1.8), (20, 1.95), (30, 2.0))
    ]
    assert steps_to_share(readings, 0.95) == 20
    assert steps_to_share(readings[:1], 0.95) is None
    assert steps_to_share([], 0.95) is None


def figure(*values: float | None) -> dict:
    from cwdpo.evaluation.intervals import mean_interval

    return mean_interval(values)


def test_verdicts_follow_paired_intervals() -> None:
    ours = {"label": "CW-DPO", "name": "cw_dpo", "figures": {"ece": figure(0.01, 0.02, 0.03)}}
    worse = {"label": "DPO", "figures": {"ece": figure(0.11, 0.12, 0.13)}}
    alike = {"label": "SFT", "figures": {"ece": figure(0.02, 0.01, 0.04)}}
    failed = {"label": "X", "figures": {"ece": figure(None, None, 0.1)}}
    found = compared("ece", "lower", ours, worse)
    assert (found["word"], found["n"]) == ("better", 3)
    assert found["mean"] == pytest.approx(-0.1)
    assert compared("ece", "higher", ours, worse)["word"] == "worse"
    assert compared("ece", "lower", worse, ours)["word"] == "worse"
    assert compared("ece", "lower", ours, alike)["word"] == "no clear difference"
    assert compared("ece", "lower", ours, failed)["word"] == "not measured"


def test_a_failed_cell_is_shown() -> None:
    row = {"label": "DPO", "cells": [{"status": "failed"}, {"status": "done"}]}
    assert name_of(row) == "DPO (1 of 2 cells FAILED)"
    assert number(figure(None), 3) == "-"
    assert number(figure(0.5), 3) == "0.500"


def test_the_shipped_settings_were_swept() -> None:
    study = load_study("demo")
    assert {len(v.settings()) for v in study.variants.values()} == {8}, "every method has the same budget"
    for m in methods.swept_methods():
        grid = study.variants[m.name].grid
        tried = {
            key.removeprefix("stage2.").removeprefix("objective."): values for key, values in grid.items()
        }
        settings = {**m.stage2, "learning_rate": m.learning_rate}
        assert {key: settings[key] in values for key, values in tried.items()} == dict.fromkeys(
            tried, True
        ), m.name
        methods.cell_recipe(m, 0, "train.jsonl", "validation.jsonl", "model").stage2.build()


def test_all_methods_take_the_same_steps_over_the_same_data() -> None:
    recipes = [methods.cell_recipe(m, 1, "t.jsonl", "v.jsonl", "model") for m in methods.swept_methods()]
    assert (
        len({(r.stage1.steps, r.stage2.steps, r.train.batch_size, r.data.path, r.seed) for r in recipes}) == 1
    )
    assert len({r.train.model_dump_json() for r in recipes}) == 1


@pytest.mark.slow
def test_a_small_demo_from_data_to_report(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(methods, "STAGE1_STEPS", 2)
    monkeypatch.setattr(methods, "STAGE2_STEPS", 3)
    monkeypatch.setattr(demo, "TRAIN_ROWS", 96)
    settings = demo.DemoSettings(seeds=(0, 1), hot_seeds=(0, 1), test_prompts=12)
    summary = demo.run_demo(tmp_path / "demo", settings)
    stored = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert stored["methods"][0]["figures"].keys() == summary["methods"][0]["figures"].keys()
    keys = {f["key"] for f in stored["figures"]}
    for m in (*stored["methods"], *stored["hot"]["methods"]):
        assert [c["status"] for c in m["cells"]] == ["done", "done"], m["cells"]
        assert keys == m["figures"].keys()
        measured = {k for k, f in m["figures"].items() if f["mean"] is not None}
        assert keys - measured <= {"steps_to_95"}, keys - measured
        assert m["curves"]["margin"]
    assert stored["methods"][0]["figures"]["win_rate"]["mean"] == 0.5, "continued SFT ties with itself"
    assert len(stored["gallery"]) == 6
    assert "CW-DPO" in markdown(stored, stored["methods"])
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000

    again = demo.run_demo(tmp_path / "demo", settings)
    assert again["methods"] == summary["methods"] or [{**m, "cells": None} for m in again["methods"]] == [
        {**m, "cells": None} for m in summary["methods"]
    ], "finished cells are used again"


@pytest.mark.slow
def test_a_cell_that_fails_is_a_row_of_the_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(methods, "STAGE1_STEPS", 2)
    monkeypatch.setattr(methods, "STAGE2_STEPS", 2)
    monkeypatch.setattr(demo, "TRAIN_ROWS", 64)
    swept = [m for m in methods.swept_methods() if m.name in ("sft", "cw_dpo")]
    monkeypatch.setattr(demo, "swept_methods", lambda: swept)
    real = demo.run_grid

    def fail_one(waves, workers, on_event):
        results = real(waves, workers, on_event)
        results["cw_dpo-seed0"] = CellResult("cw_dpo-seed0", "failed", {}, "NonFiniteError: planted", 1.0)
        return results

    monkeypatch.setattr(demo, "run_grid", fail_one)
    summary = demo.run_demo(tmp_path / "demo", demo.DemoSettings(seeds=(0,), hot_seeds=(0,), test_prompts=8))
    ours = next(m for m in summary["methods"] if m["name"] == "cw_dpo")
    assert ours["cells"][0]["status"] == "failed"
    assert ours["figures"]["sampled_correct"]["mean"] is None
    assert "planted" in (tmp_path / "demo" / "report.html").read_text()


def test_edits_are_counted_and_shown(tmp_path: Path) -> None:
    from cwdpo.lab.edits import read, table

    (tmp_path / "captions.txt").write_text("A brown dog runs .\n\nNothing here\n")
    text = table(read(tmp_path / "captions.txt"), ["colour"], 5)
    assert text.startswith("1 of 2 captions (50.0%) yield at least one edit; 3 edits in all; 0 equal chosen")
    assert "| colour | 1 | 1 |" in text
    assert "| colour | A ~~brown~~ **" in text
