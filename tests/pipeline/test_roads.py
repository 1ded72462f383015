"""Every objective with every probe on both roads to a first step: fixed negatives, and rounds of sampled ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import parse_recipe
from cwdpo.dynamics.settings import TYPES
from cwdpo.errors import DataError, RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.objectives.cw_dpo import floor_for_weight
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.worlds.shapes import ShapesSettings, materialise

ROADS = {"once": {}, "rounds": {"on_policy_fraction": 0.5, "rounds": 2, "sampler": {"max_new_tokens": 40}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world whose negatives carry the reward margin that madpo and uni_dpo read."""
    folder = tmp_path_factory.mktemp("roads")
    materialise(ShapesSettings(seed=3, train=24, validation=8, test=0, negatives_per_prompt=2), folder)
    for name in ("train", "validation"):
        rows = read_jsonl(folder / f"{name}.jsonl")
        for row in rows:
            for negative in row["negatives"]:
                negative["made"] = {**negative.get("made", {}), "reward_margin": 0.5}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(world: Path, objective: Any, road: str, **changes: Any) -> Any:
    tree: dict[str, Any] = {
        "model": {"path": "embedded", "device": "cpu", "freeze": ["vision"]},
        "data": {"path": str(world / "train.jsonl"), "validation_path": str(world / "validation.jsonl")},
        "negatives": ROADS[road],
        "stage1": {"enabled": False},
        "stage2": {"objective": objective, "learning_rate": 1e-4, "steps": 2},
        "train": {"batch_size": 4, "logging_steps": 1},
        "calibration": {"samples": 4, "max_new_tokens": 30},
        "probes": {"every": 1, "prompts": 4, "influence": 1, "types": list(TYPES), "max_new_tokens": 30},
        "curriculum": "by_readings",
        "evaluation": {"prompts": 0},
    }
    return parse_recipe({**tree, **changes})


FAST = {("cw_dpo", "rounds"), ("mdpo", "rounds"), ("sft", "rounds")}


# Rounds go the longer way; of the fast tests they have three objectives (sft: without negatives).
@pytest.mark.parametrize(
    ("name", "road"),
    [
        pytest.param(name, road, marks=() if (name, road) in FAST else pytest.mark.slow)
        for name in OBJECTIVES.names()
        for road in ("once", "rounds")
    ],
)
def test_every_objective_with_every_probe_on_both_roads(
    world: Path, tmp_path: Path, name: str, road: str
) -> None:
    if name in ("madpo", "uni_dpo") and road == "rounds":
        with pytest.raises(DataError, match=rf"{name}: a negative has no made\.reward_margin"):
            train_two_stage(recipe(world, name, road), tmp_path / "run")
        return
    run = train_two_stage(recipe(world, name, road), tmp_path / "run")
    names = {r["name"] for r in run.readings() if r["step"] == 2}
    assert {"delta_logp/chosen", "kl", "ece", "influence/sign", "gradient/sampled"} - {
        "gradient/sampled"
    } <= names
    assert {f"delta_logp/{t}" for t in ("shuffled", "chosen_initial", "on_policy")} <= names
    losses = [r["loss"] for r in read_jsonl(run.path / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 2
    plans = read_jsonl(run.path / "curriculum.jsonl")
    if OBJECTIVES.build(name).needs_reference:
        assert plans[0]["of"] > 0, "the window knows the negatives that it stands over"


MINE = """
from collections.abc import Sequence
from cwdpo.objectives.base import Objective, ObjectiveOutput, Scale

def spread(logp, token):
    return logp.std(-1)

class Mine(Objective):
    token_stats = ("entropy", spread)
    calibrates = ("pivot",)
    pivot: float | str = "auto"

    def calibrated(self, mean_logps):
        return self.model_copy(update={"pivot": min(mean_logps)})

    def logged(self):
        return {"mine/pivot": self.pivot}

    def probe_scale(self):
        return Scale(floor=self.pivot, tau=0.5)

    def __call__(self, pairs):
        assert self.pivot != "auto"
        weight = (pairs.rejected.mean_logp.detach() - self.pivot).sigmoid()
        stats = pairs.rejected.stats
        loss = pairs.mean_over_prompts(weight * (pairs.rejected.shift - pairs.chosen_shift))
        return ObjectiveOutput(
            loss + 0.01 * stats["spread"].mean(),
            per_pair={"mine/entropy": stats["entropy"].detach(), "mine/spread": stats["spread"].detach()},
        )
"""


@pytest.mark.parametrize("road", ROADS)
def test_an_objective_of_ones_own_calibrates_and_has_a_statistic_of_its_own(
    world: Path, tmp_path: Path, road: str
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    negatives = ROADS[road] | ({"recalibrate": True} if road == "rounds" else {})
    own = recipe(world, f"{tmp_path / 'mine.py'}:Mine", road, negatives=negatives)
    run = train_two_stage(own, tmp_path / "run")
    stored = run.json("calibration.json")
    assert stored["pivot"] == min(stored["mean_logps"])
    assert stored["n"] == 4
    rows = [r for r in read_jsonl(run.path / "metrics.jsonl") if "loss" in r]
    assert rows[0]["mine/pivot"] == stored["pivot"]
    assert rows[0]["mine/entropy"] > 0
    assert rows[0]["mine/spread"] > 0
    if road == "rounds":
        again = run.json("calibration-round1.json")
        assert rows[1]["mine/pivot"] == again["pivot"] != stored["pivot"], (
            "calibrated again in the second round"
        )
    weights = [r for r in run.readings() if r["name"].startswith("cooling/weight/")]
    assert weights, "the probes read the floor of the objective in force"


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_a_target_weight_is_the_mean_weight_of_the_first_step(world: Path, tmp_path: Path, road: str) -> None:
    """The first step holds all pairs, and its policy is the reference."""
    objective = {"name": "cw_dpo", "target_weight": 0.3}
    train = {"batch_size": 24, "logging_steps": 1}
    made = recipe(world, objective, road, train=train, curriculum="steady")
    run = train_two_stage(made, tmp_path / "run")
    first = next(r for r in run.metrics() if "loss" in r)
    assert first["cooling/weight_mean"] == pytest.approx(0.3, abs=0.01)
    stored = run.json("calibration.json" if road == "once" else "calibration-round0.json")
    assert len(stored["negatives"]) == 1000
    assert stored["floor"] == pytest.approx(floor_for_weight(0.3, stored["negatives"], stored["tau"]))
    if road == "rounds":
        again = recipe(world, objective, road, negatives={**ROADS[road], "recalibrate": True})
        with pytest.raises(RecipeError, match="recalibrate: the objective sets its floor by the negatives"):
            train_two_stage(again, tmp_path / "again")


@pytest.mark.parametrize("road", ROADS)
def test_unreadable_pictures_are_named_and_counted_on_both_roads(
    world: Path, tmp_path: Path, road: str
) -> None:
    data = shutil.copytree(world, tmp_path / "world")
    for row in read_jsonl(data / "train.jsonl")[:3]:
        picture = data / row["images"][0]
        picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(DataError, match=r"3 of 24 examples cannot be used.*max_bad_fraction = 0\.01"):
        train_two_stage(recipe(data, "dpo", road), tmp_path / "refused")
    tolerant = recipe(data, "dpo", road)
    tolerant = tolerant.model_copy(
        update={"data": tolerant.data.model_copy(update={"max_bad_fraction": 0.2})}
    )
    run = train_two_stage(tolerant, tmp_path / "run")
    problems = [r for r in read_jsonl(run.path / "problems.jsonl") if r["stage"] == "stage2"]
    assert len(problems) == 3
    assert all("images: cannot be decoded" in r["problem"] for r in problems)


def test_influence_without_a_negative_to_learn_from_is_refused(world: Path, tmp_path: Path) -> None:
    data = shutil.copytree(world, tmp_path / "world")
    bare = [
        {
            "id": r["id"],
            "images": r["images"],
            "prompt": r["prompt"],
            "completion": r["chosen"],
            "scene": r["scene"],
        }
        for r in read_jsonl(data / "train.jsonl")
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    negatives = {**ROADS["rounds"], "on_policy_fraction": 1.0}
    with pytest.raises(RecipeError, match=r"probes\.influence: no training example has a negative"):
        train_two_stage(recipe(data, "dpo", "rounds", negatives=negatives), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
