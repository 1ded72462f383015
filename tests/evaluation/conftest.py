"""A run of two short stages with LoRA, and one of its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.config import parse_recipe
from cwdpo.pipeline.two_stage import train_two_stage


@pytest.fixture(scope="package")
def trained(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked") / "run"
    stage = {"steps": 2, "learning_rate": 1e-3}
    recipe = parse_recipe(
        {
            "model": {
                "path": "embedded",
                "device": "cpu",
                "tune": "lora",
                "lora": {"r": 2},
                "freeze": ["vision"],
            },
            "data": {"path": str(world_folder / "train.jsonl"), "validation_fraction": 0.2},
            "stage1": {"objective": {"name": "sft"}, **stage},
            "stage2": {"objective": {"name": "dpo"}, **stage},
            "train": {"batch_size": 4},
            "evaluation": {"prompts": 0},
        }
    )
    train_two_stage(recipe, folder)
    return folder


@pytest.fixture
def picture(world_folder: Path) -> Path:
    return world_folder / "images" / "train-00000.png"
