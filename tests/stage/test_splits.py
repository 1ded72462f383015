"""What the parts of the data get for their stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.config import parse_recipe
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import prepare_data


@pytest.mark.parametrize(
    ("objective", "some"), [("sft", False), ("sft_constrained", True), ("unlikelihood", True)]
)
@pytest.mark.parametrize("streaming", [None, {"window": 64, "validation": 8}])
def test_stage_1_gets_gentle_negatives_if_its_loss_uses_them(
    objective: str, some: bool, streaming: dict[str, int] | None, world_folder: Path, tmp_path: Path
) -> None:
    data = {"path": str(world_folder / "train.jsonl"), "stage1_fraction": 0.5}
    recipe = parse_recipe(
        {
            "data": data if streaming is None else {**data, "streaming": streaming},
            "negatives": {"gentle": "perturb"},
            "stage1": {"objective": objective, "steps": 1},
            "stage2": {"steps": 1},
            "probes": {"prompts": 3},
        }
    )
    splits = prepare_data(recipe, RunDir(tmp_path))
    assert splits.stage1
    assert any(e.gentle for e in splits.stage1) == some
    made = [bool(e.gentle) and "source" in e.gentle[0].made for e in splits.validation]
    assert made[:3] == [True] * 3, "for the probes"
    assert len(made) > 3
    assert not any(made[3:])
    assert not any(e.gentle for e in splits.stage2)
