"""The methods that the demo compares, each at its own swept settings.

Every method takes the same number of optimizer steps from the same base over the same data: stage 1,
then stage 2. Continued SFT, DPO and DPO + SFT take plain SFT as stage 1; CW-DPO takes SFT with gentle
negatives, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from cwdpo.config import Recipe, parse_recipe

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


LABELS = {"sft": "continued SFT", "dpo": "DPO", "dpo_sft": "DPO + SFT term", "cw_dpo": "CW-DPO"}
STAGE1 = {name: {"name": "sft"} for name in ("sft", "dpo", "dpo_sft")} | {
    "cw_dpo": {"name": "sft_constrained", "penalty": 0.1, "constraint": 0.8}
}
OBJECTIVE = {"sft": "sft", "dpo": "dpo", "dpo_sft": "dpo", "cw_dpo": "cw_dpo"}


def method(name: str, learning_rate: float, **settings: Any) -> Method:
    """A method at some settings of its stage-2 objective."""
    return Method(name, LABELS[name], STAGE1[name], {"name": OBJECTIVE[name], **settings}, learning_rate)


def swept_methods() -> list[Method]:
    """The four methods at the settings that the sweep chose (``study/swept.yaml``)."""
    text = resources.files("cwdpo.study").joinpath("swept.yaml").read_text(encoding="utf-8")
    chosen = yaml.safe_load(text)["chosen"]
    return [method(name, **settings) for name, settings in chosen.items()]


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
