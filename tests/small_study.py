"""A small study of two variants, and summaries of it made from given scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo.lab.grid import CellResult
from cwdpo.lab.outcome import outcome
from cwdpo.lab.plan import Plan
from cwdpo.lab.spec import Study
from cwdpo.report.summary import Summary

TINY = (
    "data.world.train=24", "data.world.validation=8", "data.world.test=4", "stage1.steps=1", "stage2.steps=1",
    "train.batch_size=4", "calibration.samples=4", "calibration.max_new_tokens=8", "probes.prompts=4",
)  # fmt: skip


def study(**changes: Any) -> Study:
    tree = {
        "name": "small", "title": "A small study", "question": "Does it hold together?",
        "full": "cw_dpo", "common": TINY,
        "variants": {
            "cw_dpo": {"label": "CW-DPO", "set": ["stage2.objective={name: cw_dpo}"]},
            "dpo": {"label": "DPO", "set": ["stage2.objective={name: dpo}"]},
        },
    }  # fmt: skip
    return Study.model_validate({**tree, **changes})


def summary_of(values: dict[str, list[float | None]], spec: Study | None = None) -> Summary:
    spec = spec or study(variants={name: {"label": name.upper()} for name in values})
    results = {
        f"{name}-seed{i}": CellResult(
            f"{name}-seed{i}", "failed" if v is None else "done", {} if v is None else {"judge_score": v},
            "NonFiniteError: planted\nand more" if v is None else None, 1.0,
        )
        for name, row in values.items()
        for i, v in enumerate(row)
    }  # fmt: skip
    return outcome(Path("nowhere"), spec, range(min(map(len, values.values()))), Plan(), results, {})
