"""Plans from readings by hand, the window on a step's negatives, and a plan that survives a resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cwdpo.config import parse_recipe
from cwdpo.curriculum.base import CURRICULA, Hardness, Plan, next_round
from cwdpo.curriculum.by_readings import ByReadings
from cwdpo.data.encode.collate import collate
from cwdpo.errors import RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.monitor.window import hardness_of, in_window
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import reference_pass, scored_pairs
from cwdpo.stage.listener import Listener

HARD = Hardness(floor=-1.0, tau=0.5, mean_logps=(-9.0, -3.0, -1.5, -0.5, 0.0))


@pytest.mark.parametrize("name", CURRICULA.names())
def test_every_curriculum_is_pure_and_keeps_a_plan_without_readings(name: str) -> None:
    curriculum = CURRICULA.build(name)
    plan = next_round(curriculum, None, {}, HARD)
    assert plan.low < plan.high
    assert next_round(curriculum, plan, {}, HARD) == plan
    assert next_round(curriculum, plan, {"delta_logp/chosen": None}, HARD) == plan
    worst = {"delta_logp/chosen": -1.0, "cooling/cooled": 1.0}
    assert next_round(curriculum, plan, worst, HARD) == next_round(curriculum, plan, worst, HARD)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_drift_makes_negatives_gentler_and_cooled_ones_harder() -> None:
    curriculum = ByReadings(start_low=-6, start_high=6, notch=1, narrowest=2)
    first = next_round(curriculum, None, {}, HARD)
    assert (first.low, first.high) == (-4.0, 2.0)
    gentler = next_round(curriculum, first, {"delta_logp/chosen": -0.02, "cooling/cooled": 0.9}, HARD)
    assert (gentler.low, gentler.high) == (-4.0, -0.5)  # from the hardest at hand (0.0), by one notch of tau
    assert gentler.reason == "gentler: delta_logp/chosen -0.02"
    harder = next_round(curriculum, first, {"delta_logp/chosen": 0.0, "cooling/cooled": 0.9}, HARD)
    assert (harder.low, harder.high) == (-3.5, 2.0)
    assert harder.reason == "harder: cooling/cooled 0.9"


def test_the_share_of_fresh_negatives_moves_with_the_window_where_there_are_rounds() -> None:
    curriculum = ByReadings(fresh_notch=0.4)
    in_rounds = replace(HARD, rounds=True)
    cooled, drift = {"cooling/cooled": 0.9}, {"delta_logp/chosen": -0.02}
    plan = next_round(curriculum, None, {}, in_rounds)
    shares = []
    for readings in (cooled, cooled, cooled, drift, drift):
        plan = next_round(curriculum, plan, readings, in_rounds)
        shares.append(plan.fresh)
    assert shares == pytest.approx([0.4, 0.8, 1.0, 0.6, 0.2])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    alone = next_round(curriculum, next_round(curriculum, None, {}, HARD), cooled, HARD)
    assert alone.fresh == 0.0


def test_the_window_never_closes() -> None:
    curriculum = ByReadings()
    plan = next_round(curriculum, None, {}, HARD)
    for readings in [{"delta_logp/chosen": -1.0}] * 30 + [{"cooling/cooled": 1.0}] * 30:
        plan = next_round(curriculum, plan, readings, HARD)
        assert plan.high - plan.low >= 2 * HARD.tau - 1e-9


def test_settings_are_checked_when_the_recipe_is_read() -> None:
    with pytest.raises(RecipeError, match="did you mean 'by_readings'"):
        parse_recipe({"data": {"path": "x"}, "curriculum": "by_reading"})
    with pytest.raises(RecipeError, match="notch"):
        parse_recipe({"data": {"path": "x"}, "curriculum": {"name": "by_readings", "notch": 0}})
    with pytest.raises(RecipeError, match="at least narrowest"):
        parse_recipe({"data": {"path": "x"}, "curriculum": {"name": "by_readings", "start_low": 5}})


# --- the window on a batch ------------------------------------------------------------------------------


@pytest.fixture
def batch(model, encoder, examples):
    encoded = reference_pass(model, encoder.encode_all(examples[:6], "rejected", require_negative=True)[0])
    return collate([e for e in encoded if len(e.negatives) == 2][:3])


def means(batch) -> list[float]:
    own = [batch.completions[i] for i in batch.rejected.tolist()]
    return [c.reference_sum_logp / len(c.ids) for c in own]


def test_the_window_takes_what_lies_in_it_and_the_nearest_where_nothing_does(batch) -> None:
    values = means(batch)
    assert in_window(batch, Plan()) is batch
    cut = sorted(values)[3]
    left = in_window(batch, Plan(low=cut))
    expected = {i for i, v in enumerate(values) if v >= cut}
    for prompt in range(3):
        own = [i for i in range(len(values)) if batch.pair_prompt[i] == prompt]
        if not expected & set(own):
            expected.add(max(own, key=lambda i: values[i]))
    assert means(left) == [v for i, v in enumerate(values) if i in expected]
    assert left.n_paired_prompts == 3
    nothing = in_window(batch, Plan(low=1.0, high=2.0))
    assert len(nothing.rejected) == 3


def test_a_smaller_batch_scores_as_its_pairs_did(model, batch) -> None:
    keep = [i % 2 == 0 for i in range(len(batch.rejected))]
    whole = scored_pairs(batch, plain.score(model, batch))
    small = batch.keep_pairs(keep)
    part = scored_pairs(small, plain.score(model, small))
    assert torch.allclose(part.rejected.sum_logp, whole.rejected.sum_logp[torch.tensor(keep)], atol=1e-4)
    assert torch.allclose(part.chosen.sum_logp, whole.chosen.sum_logp, atol=1e-4)
    assert part.prompt.tolist() == [p for p, k in zip(whole.prompt.tolist(), keep, strict=True) if k]


def test_hardness_is_the_coolings_own_scale_or_that_of_chosen(model, encoder, examples) -> None:
    encoded = reference_pass(model, encoder.encode_all(examples[:4], "rejected", require_negative=True)[0])
    cooled = OBJECTIVES.build({"name": "cw_dpo", "floor": -1.0, "tau": 0.25})
    assert (hardness_of(cooled, encoded).floor, hardness_of(cooled, encoded).tau) == (-1.0, 0.25)
    found = hardness_of(OBJECTIVES.build("dpo"), encoded)
    chosen = sorted(e.chosen.reference_sum_logp / len(e.chosen.ids) for e in encoded)
    assert chosen[0] < found.floor < chosen[1]
    assert len(found.mean_logps) == sum(len(e.negatives) for e in encoded)


# --- in a run -------------------------------------------------------------------------------------------


def recipe(**train: Any) -> Any:
    return parse_recipe(
        {
            "seed": 3,
            "model": {"path": "embedded", "device": "cpu", "freeze": ["vision"]},
            "data": {
                "world": {"seed": 1, "train": 48, "validation": 12, "test": 0, "negatives_per_prompt": 3}
            },
            "stage1": {"enabled": False, "objective": "sft", "learning_rate": 1e-4},
            "stage2": {
                "objective": {"name": "cw_dpo", "floor": -0.5, "tau": 0.3},
                "learning_rate": 1e-4,
                "steps": 8,
            },
            "train": {"batch_size": 4, "warmup_steps": 0, "logging_steps": 1, **train},
            "probes": {"every": 2, "prompts": 6, "types": []},
            "evaluation": {"prompts": 0},
            "stop": [],
            "curriculum": {"name": "by_readings", "cooled_above": 0.0, "start_low": -20.0, "notch": 5.0},
        }
    )


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_plan(tmp_path) -> None:
    from safetensors.torch import load_file

    whole = train_two_stage(recipe(save_steps=3), tmp_path / "whole")
    rows = read_jsonl(whole.path / "curriculum.jsonl")
    assert [r["step"] for r in rows][:3] == [0, 2, 4]
    assert rows[1]["low"] > rows[0]["low"]
    assert rows[-1]["negatives"] < rows[0]["negatives"] <= rows[0]["of"]

    class Killed(BaseException):
        pass

    def kill(stage: str, step: int, steps: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train_two_stage(recipe(save_steps=3), tmp_path / "cut", listener=Listener(step=kill))
    cut = train_two_stage(recipe(save_steps=3), tmp_path / "cut", resume=True)
    assert read_jsonl(cut.path / "curriculum.jsonl") == rows
    mine, theirs = (load_file(r.path / "model" / "model.safetensors") for r in (cut, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_an_open_plan_is_written_without_infinity() -> None:
    row = Plan(high=math.inf).to_json()
    assert (row["low"], row["high"]) == (None, None)
    json.dumps(row, allow_nan=False)
