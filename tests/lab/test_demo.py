"""The demo is a study: its settings, a small whole one with its page, and one with a failed cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cwdpo.lab import ablate as engine
from cwdpo.lab.cell import spread, steps_to_share
from cwdpo.lab.grid import CellResult
from cwdpo.lab.outcome import pooled, win_over_seeds
from cwdpo.lab.plan import asked, checked_tree, plan
from cwdpo.lab.spec import RECIPE, Study, load_study, overrides_of, settings_for
from cwdpo.lab.tables import number
from cwdpo.report.summary import CellState, Mean, Row, Summary, read_summary

METHODS = ("sft", "dpo", "dpo_sft", "cw_dpo")
SMALL = (
    "data.world.train=96", "data.world.validation=64", "data.world.test=12", "stage1.steps=2", "stage2.steps=3",
)  # fmt: skip


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


def test_a_failed_cell_is_shown() -> None:
    cells = (CellState(0, "failed", "x", 1.0), CellState(1, "done", None, 1.0))
    assert Row("dpo", "DPO", (), {}, None, {}, {}, cells).named == "DPO (1 of 2 cells FAILED)"
    assert number(Mean(None, None, None, 0), 3) == "-"
    assert number(Mean(0.5, None, None, 1), 3) == "0.500"
    assert number(Mean(0.5, 0.4, 0.6, 2), 2) == "0.50 ±0.10"


def test_win_rates_and_reliability_over_seeds_by_hand() -> None:
    """Three prompts a seed, two samples each: 4 wins, 3 ties and 5 losses of 12; a failed seed does not count."""
    ours = [[[1, 1], [0.5, 0.5], [0, 0]], None, [[1, 0], [1, 0], [0.5, 0]]]
    rival = [[[0, 0], [0.5, 0.5], [1, 1]], [[0, 0]] * 3, [[0, 1], [0, 1], [0.5, 1]]]
    found = win_over_seeds(ours, rival)
    assert found.mean == pytest.approx((4 + 3 / 2) / 12)
    assert (found.n, found.per_seed) == (2, (0.5, None, pytest.approx(2.5 / 6)))
    rows = [[{"confidence": 0.5, "accuracy": 0.5, "n": 1}], [{"confidence": 0.52, "accuracy": 1.0, "n": 3}]]
    (one,) = pooled(rows)
    assert (one.n, one.confidence, one.accuracy) == (4, pytest.approx(0.515), pytest.approx(0.875))


def test_the_shipped_settings_were_swept() -> None:
    study = load_study("demo")
    chosen = settings_for(study, None)
    grids = {name: v.grid for name, v in study.variants.items() if v.grid}
    assert {len(study.variants[name].settings()) for name in grids} == {8}, "every method has the same budget"
    assert set(grids) == set(chosen) == set(METHODS)
    for name, grid in grids.items():
        settings = {key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in chosen[name])}
        assert all(settings[key] in values for key, values in grid.items()), name


def test_all_methods_take_the_same_steps_over_the_same_data(tmp_path: Path) -> None:
    study = small()
    cells = plan(
        tmp_path, checked_tree(RECIPE), study, asked(study, [1], settings_for(study, None)), split="test", test=None
    ).cells  # fmt: skip
    recipes = {key.removesuffix("-seed1"): job.recipe for key, job in cells.items()}
    assert set(recipes) == {"base", *METHODS, *(f"{m}-hot" for m in METHODS)}
    assert (
        len({(r.stage1.steps, r.stage2.steps, r.data.model_dump_json(), r.seed) for r in recipes.values()})
        == 1
    )
    assert len({r.train.model_dump_json() for r in recipes.values()}) == 1
    for name in METHODS:
        swept, hot = recipes[name].stage2, recipes[f"{name}-hot"].stage2
        assert hot.objective == swept.objective
        assert hot.learning_rate == 4 * swept.learning_rate
    assert checked_tree(RECIPE)["data"]["world"]["train"] == 1600
    assert not any(
        "steps" in o or "train=" in o for o in overrides_of(load_study("demo"), "sft-hot", chosen())
    )


def chosen() -> dict[str, tuple[str, ...]]:
    return settings_for(load_study("demo"), None)


def small(*names: str, **changes: Any) -> Study:
    study = load_study("demo")
    study = study.model_copy(update={"common": (*study.common, *SMALL), **changes})
    return study.only(names) if names else study


@pytest.mark.slow
def test_a_small_demo_from_data_to_report(tmp_path: Path) -> None:
    begun: list[str] = []

    def run() -> Summary:
        return engine.ablate(
            RECIPE, small(), tmp_path / "demo", seeds=2, jobs=2, chosen=chosen(),
            on_page=lambda page: begun.append(page.read_text()),
        )  # fmt: skip

    summary = run()
    stored = read_summary(tmp_path / "demo")
    assert stored == summary
    keys = {f.key for f in stored.figures}
    for v in stored.variants:
        assert [c.status for c in v.cells] == ["done", "done"], v.cells
        assert keys == v.figures.keys()
        measured = {k for k, f in v.figures.items() if f.mean is not None}
        assert keys - measured <= {"steps_to_95", "grad_norm_tail"}, keys - measured
        assert bool(v.curves) == bool(v.reliability) == (v.name in stored.shown)
    assert stored.row("cw_dpo").curves["margin"]
    assert stored.row("sft").figures["win_rate"].mean == 0.5, "continued SFT ties with itself"
    assert stored.base["sampled_correct"].n == 1
    assert set(stored.base) == {
        "score",
        "sampled_correct",
        "greedy_correct",
        "ill_formed",
        "judge_score",
        "ece",
        "top1",
    }
    assert len(stored.gallery) == 6
    assert [c.label for c in stored.gallery[0].captions] == [
        "before training", "DPO, 4x rate", "CW-DPO, 4x rate", "DPO + SFT term, 4x rate", "continued SFT, 4x rate",
    ]  # fmt: skip
    assert len(stored.compared) == 7
    page = (tmp_path / "demo" / "report.html").read_text()
    assert len(page) > 50_000
    assert ("Running: begins" in begun[0], "Running" in page) == (True, False)
    assert ('http-equiv="refresh"' in begun[0], 'http-equiv="refresh"' in page) == (True, False)
    assert "<svg viewBox" not in begun[0], "charts are drawn once, at the end"
    assert page.count("data:image/") == 6
    assert "corrected (Holm) for the 7 comparisons of a column" in page
    again = run()
    assert again.variants == summary.variants, "finished cells are reused"


@pytest.mark.slow
def test_a_cell_that_fails_is_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.run_grid

    def fail_one(*arguments: Any) -> dict[str, CellResult]:
        results = real(*arguments)
        results["cw_dpo-seed0"] = CellResult("cw_dpo-seed0", "failed", {}, "NonFiniteError: planted", 1.0)
        return results

    monkeypatch.setattr(engine, "run_grid", fail_one)
    summary = engine.ablate(RECIPE, small("sft"), tmp_path / "demo", seeds=1, jobs=2, chosen=chosen())
    assert [v.name for v in summary.variants] == ["sft", "cw_dpo"]
    ours = summary.row("cw_dpo")
    assert ours.cells[0].status == "failed"
    assert ours.figures["sampled_correct"].mean is None
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "planted" in page
    assert "no finished run" in page
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["shown"] == ["cw_dpo", "sft"]
