"""The methods that the demo compares, each at its own swept settings.

Every method takes the same number of optimizer steps from the same base over the same data: stage 1,
then stage 2. Continued SFT, DPO and DPO + SFT take plain SFT as stage 1; CW-DPO takes SFT with gentle
negatives, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cwdpo.config import Recipe, parse_recipe
from cwdpo.lab.spec import load_chosen, load_study, overrides_of

STAGE1_STEPS = 50
STAGE2_STEPS = 100
BATCH = 16
TRAIN_ROWS = 1600
HOT = 4


@dataclass(frozen=True)
class Method:
    """A name for tables, and the two objectives with stage 2's learning rate."""

    name: str
    label: str
    stage1: dict[str, Any]
    stage2: dict[str, Any]
    learning_rate: float


def swept_methods() -> list[Method]:
    """The methods of the study ``demo`` at the settings that its sweep chose (``lab/swept.yaml``)."""
    study = load_study("demo")
    with resources.as_file(resources.files("cwdpo.lab").joinpath("swept.yaml")) as path:
        chosen = load_chosen(Path(path))
    found = []
    for name in study.variants:
        recipe = parse_recipe({"name": name, "model": {"path": "embedded"}, "data": {"world": {}}},
                              overrides_of(study, name, chosen))  # fmt: skip
        stage2 = recipe.stage2
        found.append(
            Method(name, study.label(name), recipe.stage1.objective, stage2.objective, stage2.learning_rate)
        )
    return found


def cell_recipe(m: Method, seed: int, data: str, validation: str, model: str, factor: float = 1.0) -> Recipe:
    """The recipe of one cell.

    Args:
        m: the method.
        seed: of data order, sampling and adapters.
        data, validation: paths of JSONL files.
        model: folder of the model that the cell starts from.
        factor: on stage 2's learning rate (the too-hot panel).
    """
    return parse_recipe(
        {
            "name": f"{m.name}-seed{seed}",
            "seed": seed,
            "model": {"path": model, "device": "cpu", "freeze": ["vision"]},
            "data": {"path": data, "validation_path": validation, "stage1_fraction": 0.4},
            "stage1": {"objective": m.stage1, "learning_rate": 2e-4, "steps": STAGE1_STEPS},
            "stage2": {
                "objective": m.stage2,
                "learning_rate": m.learning_rate * factor,
                "steps": STAGE2_STEPS,
            },
            "train": {"batch_size": BATCH, "logging_steps": 1, "warmup_steps": 10},
            "calibration": {"samples": 200, "max_new_tokens": 40},
            "probes": {"every": 10, "prompts": 32, "types": []},
            "stop": [],  # each method to its end: the comparison is of what it does, hot or not
        }
    )
