"""The arithmetic of the studies on made-up runs, and their scenarios; what they train is not run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cwdpo.dynamics.diagnose import FindingRule, load_rules
from cwdpo.dynamics.rules import DEFAULT_STOP, parse_rule
from cwdpo.lab import curriculum_study, findings_study, stopping_study
from cwdpo.lab.grid import CellResult
from cwdpo.lab.scenarios import HEALTHY, PROVOKED, SCENARIOS, Scenario, job_of
from cwdpo.lab.traced import damage_step, halves, shared_test


def test_damage_and_halves_by_hand() -> None:
    assert damage_step([(0, 0.8), (10, 0.78), (20, 0.769), (30, 0.9)]) == 20
    assert damage_step([(0, 0.8), (10, 0.79)]) is None
    assert halves(["b", "d", "a", "c"]) == (["a", "c"], ["b", "d"])


# --- findings -------------------------------------------------------------------------------------------


def kl_rule(above: float = 0.1) -> FindingRule:
    return FindingRule.model_validate(
        {"name": "drift", "title": "t", "severity": "critical", "source": "s", "advice": "a",
         "when": [{"series": "kl", "above": above}]}
    )  # fmt: skip


def made(
    key: str, provokes: tuple[str, ...], kl: dict[int, float], trace: dict[int, float]
) -> findings_study.Run:
    rows = [{"stage": "stage2", "name": "kl", "step": s, "value": v, "n": 9} for s, v in kl.items()]
    return findings_study.Run(key, Scenario(key, provokes), rows, [], list(trace.items()))


def test_the_detection_table_by_hand() -> None:
    runs = [
        made("bad", ("drift",), {0: 0.0, 10: 0.2, 20: 0.3}, {0: 0.9, 10: 0.9, 20: 0.8}),
        made("missed", ("drift",), {0: 0.0, 10: 0.05}, {0: 0.9, 10: 0.5}),
        made("fine", (), {0: 0.0, 10: 0.01}, {0: 0.9, 10: 0.91}),
        made("false", (), {0: 0.0, 10: 0.15}, {0: 0.9, 10: 0.91}),
    ]
    found = findings_study.table(runs, [kl_rule()])
    assert (found["detected"], found["provoked"], found["false"], found["healthy"]) == (1, 2, 1, 2)
    assert found["lead"] == found["lead_critical"] == {"n": 1, "median": 10, "not_late": 1, "all": [10]}
    assert found["unseen"] == ["missed"]
    text = findings_study.markdown("x", found)
    assert "Detected 1 of 2; false alarms 1 of 2" in text
    assert "Damaged without an alarm: missed" in text


def test_bounds_move_only_where_that_tells_the_runs_apart_better() -> None:
    good = [made("bad", ("drift",), {0: 0.0, 10: 0.5}, {}), made("fine", (), {0: 0.0, 10: 0.01}, {})]
    assert findings_study.choose(good, [kl_rule()]) == {"drift": 1.0}
    false = [made("bad", ("drift",), {0: 0.0, 10: 0.5}, {}), made("fine", (), {0: 0.0, 10: 0.12}, {})]
    assert findings_study.choose(false, [kl_rule()]) == {"drift": 1.4}
    missed = [made("bad", ("drift",), {0: 0.0, 10: 0.08}, {}), made("fine", (), {0: 0.0, 10: 0.01}, {})]
    factors = findings_study.choose(missed, [kl_rule()])
    assert factors == {"drift": 0.7}
    assert findings_study.with_factors([kl_rule()], factors)[0].when[0].above == pytest.approx(0.07)


def test_scenarios_provoke_what_there_are_rules_for_and_enough_of_it(tmp_path: Path) -> None:
    known = {r.name for r in load_rules()}
    provoked = {name for s in PROVOKED for name in s.provokes}
    assert provoked <= known
    assert len(provoked) >= 12
    assert all(not s.provokes for s in HEALTHY)
    test = shared_test(tmp_path)
    scenario = SCENARIOS["long_rejected"]
    small = Scenario(scenario.name, scenario.provokes, change=scenario.change, rows=3)
    job = job_of(small, 0, tmp_path, test)
    assert job.recipe.stop == ()
    from cwdpo.data.read.reader import read_examples

    examples = read_examples(job.recipe.data.path).examples
    assert len(examples) == 3
    assert all(len(e.rejected[0].text.split()) > 1.4 * len(e.chosen.text.split()) for e in examples)


# --- stopping -------------------------------------------------------------------------------------------


def trajectory(key: str, group: str, scores: list[float], chosen: list[float]) -> stopping_study.Trajectory:
    steps = [10 * i for i in range(len(scores))]
    readings: dict[str, dict[int, Any]] = {
        "delta_logp/chosen": dict(zip(steps, chosen, strict=True)),
        "kl": {},
    }
    return stopping_study.Trajectory(key, group, list(zip(steps, scores, strict=True)), readings)


def test_what_a_stop_is_worth_by_hand() -> None:
    runs = [
        trajectory("a", "healthy", [0.8, 0.82, 0.84], [0.0, 0.01, 0.01]),
        trajectory("b", "hot", [0.8, 0.81, 0.5], [0.0, -0.01, -0.2]),
        trajectory("c", "hot", [0.8, 0.6, 0.5], [0.0, -0.1, -0.2]),
    ]
    rules = [parse_rule(text) for text in DEFAULT_STOP]
    assert [r.stopped(rules) for r in runs] == [2, 1, 0]
    found = stopping_study.outcome(runs, rules)
    assert found["hot"]["stop"]["mean"] == pytest.approx((0.81 + 0.8) / 2)
    assert found["hot"]["gain_over_end"]["mean"] == pytest.approx((0.31 + 0.3) / 2)
    assert found["hot"]["short_of_best"]["mean"] == pytest.approx(0)
    assert found["healthy"]["worst_cost"] == pytest.approx(0)
    assert (found["all"]["runs"], found["all"]["stopped_early"]) == (3, 2)
    assert stopping_study.choose(runs) == DEFAULT_STOP


def test_thresholds_that_cost_healthy_runs_are_not_chosen() -> None:
    """Stopping the hot run early pays most, but at -0.005 and -0.01 the healthy one would lose 0.05."""
    runs = [
        trajectory("a", "healthy", [0.8, 0.8, 0.85], [0.0, -0.015, 0.0]),
        trajectory("b", "hot", [0.8, 0.7, 0.6], [0.0, -0.025, -0.025]),
    ]
    chosen, _ = stopping_study.choose(runs)
    assert chosen == "chosen_delta < -0.02"
    strict = [parse_rule("chosen_delta < -0.01")]
    assert stopping_study.outcome(runs, strict)["healthy"]["worst_cost"] == pytest.approx(0.05)


def test_thirty_runs_are_planned() -> None:
    groups = [group for group, _ in stopping_study.scenarios()]
    assert {g: groups.count(g) for g in groups} == {"healthy": 3, "hot": 3, "long": 3}
    assert 3 * len(groups) + groups.count("healthy") == 30


# --- curriculum -----------------------------------------------------------------------------------------


def test_arms_are_compared_by_seed() -> None:
    def cell(arm: str, seed: int, score: float) -> CellResult:
        return CellResult(f"{arm}-seed{seed}", "done", {"judge_score": score}, None, 1.0)

    cells = [
        cell("steady", 0, 0.8),
        cell("steady", 1, 0.7),
        cell("by_readings", 0, 0.82),
        cell("by_readings", 1, 0.74),
    ]
    found = curriculum_study.compare({c.key: c for c in cells}, [0, 1])["judge_score"]
    assert found["difference"]["mean"] == pytest.approx(0.03)
    assert found["difference"]["n"] == 2
    assert "| judge_score | 0.750" in curriculum_study.markdown({"judge_score": found})
