"""How many samples floor and tau need: the intervals against scipy and simulations, the rounds against a plain loop."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cwdpo.config import parse_recipe
from cwdpo.models.load import Policy
from cwdpo.models.sample import sample
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.records import Sample
from cwdpo.rundir import RunDir
from cwdpo.stage import calibration
from cwdpo.stage.calibration import bootstrap, calibrate
from cwdpo.stage.stage import Stage


def stage_of(model: Any, encoder: Any, folder: Any, **settings: Any) -> Stage:
    recipe = parse_recipe(
        {"data": {"path": "x"}, "seed": 5, "calibration": {"max_new_tokens": 4, **settings}}
    )
    return Stage("stage2", recipe, Policy(model, encoder.processor, ""), encoder, RunDir(folder), resume=True)


def test_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(1).normal(-1.0, 0.3, 120)
    found = bootstrap(CwDpo().calibrated, [[v] for v in values.tolist()], seed=3)

    def floor(x: Any, axis: int) -> Any:
        return np.quantile(x, 0.1, axis=axis)

    def tau(x: Any, axis: int) -> Any:
        return np.quantile(x, 0.5, axis=axis) - np.quantile(x, 0.1, axis=axis)

    for name, statistic in (("floor", floor), ("tau", tau)):
        theirs = stats.bootstrap(
            (values,), statistic, n_resamples=9999, method="percentile", rng=7
        ).confidence_interval
        width = theirs.high - theirs.low
        assert found[name] == pytest.approx((theirs.low, theirs.high), abs=0.12 * width)
    # and the exact interval of a quantile, by order statistics
    exact = stats.quantile_test(values, p=0.1).confidence_interval(0.95)
    assert found["floor"] == pytest.approx((exact.low, exact.high), abs=0.4 * (exact.high - exact.low))


def test_a_setting_that_was_given_has_no_interval() -> None:
    values = np.random.default_rng(1).normal(-1.0, 0.3, 40)
    found = bootstrap(CwDpo(tau=0.3).calibrated, [[v] for v in values.tolist()])
    assert set(found) == {"floor"}


@pytest.mark.slow
def test_intervals_cover_the_truth_where_samples_of_a_prompt_resemble_each_other(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "RESAMPLES", 300)
    draws, truth = np.random.default_rng(0), -1 + 0.3 * stats.norm.ppf(0.1)
    by_prompt, single = 0, 0
    for _ in range(200):
        shared = draws.normal(size=(24, 1)) * np.sqrt(0.7)
        values = (-1 + 0.3 * (shared + draws.normal(size=(24, 4)) * np.sqrt(0.3))).tolist()
        low, high = bootstrap(CwDpo().calibrated, values)["floor"]
        by_prompt += low <= truth <= high
        low, high = bootstrap(CwDpo().calibrated, [[v] for own in values for v in own])["floor"]
        single += low <= truth <= high
    assert by_prompt >= 170, (
        "nominally 190 of 200; a percentile bootstrap of a low quantile covers a little less"
    )
    assert single < by_prompt


def test_the_uncertainty_is_in_units_of_tau_and_relative_by_default() -> None:
    objective = CwDpo(floor=-1.0, tau=0.4)
    assert objective.uncertainty({"floor": (-1.1, -0.8), "tau": (0.3, 0.5)}) == pytest.approx(0.5)
    assert objective.uncertainty({}) == 0

    class Own(Objective):
        """L = 0."""

        level: float = 2.0

        def __call__(self, pairs: Any) -> Any:
            raise NotImplementedError

    assert Own().uncertainty({"level": (1.5, 2.2)}) == pytest.approx(0.25)
    assert Own(level=0.0).uncertainty({"level": (-0.1, 0.1)}) == float("inf")


def test_it_draws_in_rounds_until_the_settings_are_known(
    model, encoder, examples, tmp_path, monkeypatch
) -> None:
    drawn = np.random.default_rng(2).normal(-1.0, 0.3, 200).round(6)
    taken: list[int] = []

    def fake(model: Any, encoder: Any, prompts: Any, n: int, **_: Any) -> list[list[Sample]]:
        start = sum(taken)
        taken.append(len(prompts) * n)
        values = iter(drawn[start:].tolist())
        return [[Sample("x", True, 1, next(values)) for _ in range(n)] for _ in prompts]

    monkeypatch.setattr(calibration, "sample_several", fake)

    def needed(error: float) -> int:
        for n in range(20, 200, 20):
            clusters = drawn[:n].reshape(-1, 2).tolist()
            ends, known = bootstrap(CwDpo().calibrated, clusters, 5), CwDpo().calibrated(drawn[:n].tolist())
            far = [abs(e - v) for k, v in (("floor", known.floor), ("tau", known.tau)) for e in ends[k]]
            if max(far) / known.tau <= error:
                return n
        return 200

    seen = {}
    for error in (1e-6, 0.4, 0.8):
        taken.clear()
        folder = tmp_path / str(error)
        folder.mkdir()
        stage = stage_of(model, encoder, folder, error=error, round=20, per_prompt=2, samples=200)
        calibrate(stage, list(examples) * 40)
        assert set(taken) == {20}
        assert sum(taken) == needed(error)
        seen[error] = sum(taken)
        row = json.loads((folder / "calibration.json").read_text())
        assert row["n"] == len(row["mean_logps"]) == sum(taken)
        assert row["drawn"] == {"prompts": sum(taken) // 2, "most": 200, "error": error}
        assert row["interval"]["floor"][0] < row["floor"] < row["interval"]["floor"][1]
        logged = stage.in_force.known
        assert logged["calibration/n"] == sum(taken)
        assert logged["calibration/tau_high"] == row["interval"]["tau"][1]
        # a resumed stage draws nothing and logs the same
        again = stage_of(model, encoder, folder, error=error, round=20, per_prompt=2, samples=200)
        calibrate(again, examples)
        assert sum(taken) == seen[error]
        assert again.in_force == stage.in_force
    assert seen[1e-6] == 200 > seen[0.4] > seen[0.8]


def test_all_samples_at_once_are_one_for_each_prompt_in_turn(model, encoder, examples, tmp_path) -> None:
    few = examples[:5]
    stage = stage_of(model, encoder, tmp_path, error=None, per_prompt=1, samples=13)
    found = calibrate(stage, few)
    order = random.Random(5).sample(range(5), 5)
    asked = [few[order[i % 5]] for i in range(13)]
    plain = sample(model, encoder, asked, max_new_tokens=4, seed=5)
    assert found == [round(s.mean_logp or 0.0, 6) for s in plain]
    assert len(set(found)) > 10


def test_samples_behind_one_prefill_differ_and_do_not_depend_on_rounds(
    model, encoder, examples, tmp_path
) -> None:
    found = []
    for name, size in (("a", 4), ("b", 8)):
        (tmp_path / name).mkdir()
        stage = stage_of(model, encoder, tmp_path / name, error=1e-9, round=size, per_prompt=2, samples=14)
        found.append(calibrate(stage, examples[:4]))
    assert found[0] == pytest.approx(found[1], abs=2e-6)
    assert len(found[0]) == 14
    assert len(set(found[0])) == 14, "prompts that are asked again give other samples"
