"""The arithmetic of the analyses on made-up runs, the plans of their studies, and a small whole one of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cwdpo.data.read.reader import read_examples
from cwdpo.dynamics.diagnose import FindingRule, load_rules
from cwdpo.dynamics.rules import DEFAULT_STOP, parse_rule
from cwdpo.errors import CwdpoError, DataError
from cwdpo.lab import findings, stopping
from cwdpo.lab.ablate import ablate
from cwdpo.lab.plan import Plan, asked, checked_tree, plan
from cwdpo.lab.spec import RECIPE, Study, Variant, load_study, settings_for
from cwdpo.lab.trace import Traced, damage_step, halves

TINY = (
    "data.world.train=24", "data.world.validation=8", "data.world.test=4", "stage1.steps=1", "stage2.steps=2",
    "train.batch_size=4", "calibration.samples=4", "calibration.max_new_tokens=8", "probes.every=1",
)  # fmt: skip


def tiny(name: str, *only: str) -> Study:
    study = load_study(name)
    study = study.model_copy(update={"common": (*study.common, *TINY)})
    return study.only(only) if only else study


def planned(study: Study, out: Path, seeds: int = 1) -> Plan:
    chosen = settings_for(study, None)
    return plan(out, checked_tree(RECIPE), study, asked(study, range(seeds), chosen), split="test", test=None)


def run_of(key: str, trace: list[tuple[int, float]] | None = None, **variant: Any) -> Traced:
    return Traced(key, key, Variant(**variant), [], [], trace or [])


def test_damage_and_halves_by_hand() -> None:
    assert damage_step([(0, 0.8), (10, 0.78), (20, 0.769), (30, 0.9)]) == 20
    assert damage_step([(0, 0.8), (10, 0.79)]) is None
    assert [[r.key for r in half] for half in halves([run_of(k) for k in "bdac"])] == [["a", "c"], ["b", "d"]]


# --- findings -------------------------------------------------------------------------------------------


def kl_rule(above: float = 0.1) -> FindingRule:
    return FindingRule.model_validate(
        {"name": "drift", "title": "t", "severity": "critical", "source": "s", "advice": "a",
         "when": [{"series": "kl", "above": above}]}
    )  # fmt: skip


def made(key: str, provokes: tuple[str, ...], kl: dict[int, float], trace: dict[int, float]) -> Traced:
    rows = [{"stage": "stage2", "name": "kl", "step": s, "value": v, "n": 9} for s, v in kl.items()]
    return Traced(key, key, Variant(provokes=provokes), rows, [], list(trace.items()))


def test_the_detection_table_by_hand() -> None:
    runs = [
        made("bad", ("drift",), {0: 0.0, 10: 0.2, 20: 0.3}, {0: 0.9, 10: 0.9, 20: 0.8}),
        made("missed", ("drift",), {0: 0.0, 10: 0.05}, {0: 0.9, 10: 0.5}),
        made("fine", (), {0: 0.0, 10: 0.01}, {0: 0.9, 10: 0.91}),
        made("false", (), {0: 0.0, 10: 0.15}, {0: 0.9, 10: 0.91}),
    ]
    found = findings.table(runs, [kl_rule()])
    assert (found["detected"], found["provoked"], found["false"], found["healthy"]) == (1, 2, 1, 2)
    assert found["lead"] == found["lead_critical"] == {"n": 1, "median": 10, "not_late": 1, "all": [10]}
    assert found["unseen"] == ["missed"]
    text = findings.markdown("x", found)
    assert "Detected 1 of 2; false alarms 1 of 2" in text
    assert "Damaged without an alarm: missed" in text


def test_bounds_move_only_where_that_tells_the_runs_apart_better() -> None:
    good = [made("bad", ("drift",), {0: 0.0, 10: 0.5}, {}), made("fine", (), {0: 0.0, 10: 0.01}, {})]
    assert findings.choose(good, [kl_rule()]) == {"drift": 1.0}
    false = [made("bad", ("drift",), {0: 0.0, 10: 0.5}, {}), made("fine", (), {0: 0.0, 10: 0.12}, {})]
    assert findings.choose(false, [kl_rule()]) == {"drift": 1.4}
    missed = [made("bad", ("drift",), {0: 0.0, 10: 0.08}, {}), made("fine", (), {0: 0.0, 10: 0.01}, {})]
    factors = findings.choose(missed, [kl_rule()])
    assert factors == {"drift": 0.7}
    assert findings.with_factors([kl_rule()], factors)[0].when[0].above == pytest.approx(0.07)


def test_scenarios_provoke_what_there_are_rules_for_and_enough_of_it(tmp_path: Path) -> None:
    study = load_study("findings")
    provoked = {name for v in study.variants.values() for name in v.provokes}
    assert provoked <= {r.name for r in load_rules()}
    assert len(provoked) >= 12
    assert {n for n, v in study.variants.items() if not v.provokes} == {
        "healthy_cw_dpo", "healthy_dpo", "healthy_dpo_sft",
    }  # fmt: skip
    found = planned(tiny("findings", "long_rejected", "equal_pairs"), tmp_path)
    assert all(job.recipe.stop == () for job in found.cells.values())
    long = read_examples(str(found.cells["long_rejected-seed0"].recipe.data.path)).examples
    assert len(long) == 24
    words = [sum(len(text.split()) for text in texts) for texts in (
        (e.rejected[0].text for e in long), (e.chosen.text for e in long),
    )]  # fmt: skip
    assert words[0] > 1.5 * words[1], "the rule of length_bias"
    equal = read_examples(str(found.cells["equal_pairs-seed0"].recipe.data.validation_path)).examples
    from cwdpo.worlds.judged import judge_captions

    assert all(j.all_correct for j in judge_captions(equal, [e.rejected[0].text for e in equal]))


def test_rewritten_captions_are_of_the_embedded_world(tmp_path: Path) -> None:
    study = Study.model_validate({"name": "s", "full": "a", "variants": {"a": {"rejected": "long"}}})
    with pytest.raises(
        DataError, match="study s: 'rejected', 'flipped' and 'validation: own' need the embedded world"
    ):
        plan(
            tmp_path,
            {"data": {"path": "x.jsonl"}},
            study,
            asked(study, [0], {}),
            split="test",
            test=Path("t.jsonl"),
        )


# --- stopping -------------------------------------------------------------------------------------------


def trajectory(key: str, group: str, scores: list[float], chosen: list[float]) -> Traced:
    steps = [10 * i for i in range(len(scores))]
    rows = [
        {"stage": "stage2", "name": "delta_logp/chosen", "step": s, "value": v}
        for s, v in zip(steps, chosen, strict=True)
    ]
    variant = Variant(cell=(key, group))
    return Traced(key, key, variant, rows, [], list(zip(steps, scores, strict=True)))


def test_what_a_stop_is_worth_by_hand() -> None:
    runs = [
        trajectory("a", "healthy", [0.8, 0.82, 0.84], [0.0, 0.01, 0.01]),
        trajectory("b", "hot", [0.8, 0.81, 0.5], [0.0, -0.01, -0.2]),
        trajectory("c", "hot", [0.8, 0.6, 0.5], [0.0, -0.1, -0.2]),
    ]
    rules = [parse_rule(text) for text in DEFAULT_STOP]
    assert [stopping.stopped(r, rules) for r in runs] == [2, 1, 0]
    found = stopping.outcome(runs, rules)
    assert found["hot"]["stop"]["mean"] == pytest.approx((0.81 + 0.8) / 2)
    assert found["hot"]["gain_over_end"]["mean"] == pytest.approx((0.31 + 0.3) / 2)
    assert found["hot"]["short_of_best"]["mean"] == pytest.approx(0)
    assert found["healthy"]["worst_cost"] == pytest.approx(0)
    assert (found["all"]["runs"], found["all"]["stopped_early"]) == (3, 2)
    assert stopping.choose(runs) == DEFAULT_STOP


def test_thresholds_that_cost_healthy_runs_are_not_chosen() -> None:
    """Stopping the hot run early pays most, but at -0.005 and -0.01 the healthy one would lose 0.05."""
    runs = [
        trajectory("a", "healthy", [0.8, 0.8, 0.85], [0.0, -0.015, 0.0]),
        trajectory("b", "hot", [0.8, 0.7, 0.6], [0.0, -0.025, -0.025]),
    ]
    chosen, _ = stopping.choose(runs)
    assert chosen == DEFAULT_STOP[0]
    strict = [parse_rule("chosen_delta < -0.01")]
    assert stopping.outcome(runs, strict)["healthy"]["worst_cost"] == pytest.approx(0.05)


def test_thirty_runs_are_planned() -> None:
    study = load_study("stopping")
    groups = [v.cell[1] for v in study.variants.values() if v.cell]
    assert {g: groups.count(g) for g in groups} == {"healthy": 3, "hot": 3, "long": 3}
    assert len(asked(study, range(3), settings_for(study, None))) == 30


# --- curriculum, and whole studies ----------------------------------------------------------------------


def test_both_arms_of_the_curriculum_start_from_one_first_stage(tmp_path: Path) -> None:
    found = planned(tiny("curriculum"), tmp_path, seeds=2)
    assert len(found.stage1) == 2
    steady, steered = found.cells["steady-seed1"].recipe, found.cells["by_readings-seed1"].recipe
    assert steady.model.path == steered.model.path
    assert (steady.curriculum["name"], steered.curriculum["name"]) == ("steady", "by_readings")
    assert steady.stage2 == steered.stage2
    rows = read_examples(str(steady.data.path)).examples
    assert max(len(e.rejected) for e in rows) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "only", "said"),
    [
        ("findings", ("hot_dpo", "few_probes"), "| few_probes | noisy_probes |"),
        ("stopping", ("hot_dpo",), "| healthy | "),
    ],
)
def test_a_small_analysis_from_cells_to_its_table(
    run, tmp_path: Path, name: str, only: tuple[str, ...], said: str
) -> None:
    study = tiny(name, *only)
    summary = ablate(RECIPE, study, tmp_path, seeds=2, jobs=2, chosen=settings_for(study, None))
    assert not [v.failed for v in summary.variants if v.failed]
    figures = json.loads((tmp_path / "cells" / f"{only[0]}-seed0" / "figures.json").read_text())
    assert [(row["stage"], row["step"]) for row in figures["trace"]] == [("stage2", s) for s in (0, 1, 2)]
    assert said in (tmp_path / f"{name}.md").read_text()
    assert json.loads((tmp_path / f"{name}.json").read_text())
    alone = tiny(name, study.full)
    alone = alone.model_copy(
        update={"variants": {study.full: Variant(tuned_as=study.variants[study.full].tuned_as)}}
    )
    with pytest.raises(CwdpoError, match="only 1 ended with measurements: use more --seeds"):
        ablate(RECIPE, alone, tmp_path / "alone", seeds=1, jobs=1, chosen=settings_for(study, None))
