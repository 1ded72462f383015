"""How far shared-prefix rows in half precision are from plain rows, beside what half precision itself changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.collate import collate
from cwdpo.lab.bench.setting import Setting, build_model, processor
from cwdpo.lab.bench.steps import encoded_example
from cwdpo.models.shared_attention import use_scoring
from cwdpo.scoring import plain
from cwdpo.scoring.score import score


@torch.no_grad()
def rounding_report(setting: Setting) -> dict[str, dict[str, float]]:
    """Differences of the log-probabilities of one example's response tokens, in nats.

    Args:
        setting: its model and row. Weights are the same in both dtypes: those of ``setting.dtype``, cast to float32.

    Returns:
        For each pair of ways to score the row, the largest and the mean difference. Shared rows add nothing of their
        own if both are as far from plain rows in float32.
    """
    made = processor()
    model = build_model(setting, made.tokenizer).eval()

    def both(dtype: Any) -> tuple[Tensor, Tensor]:
        batch = collate([encoded_example(replace(setting, dtype=dtype), made)])
        use_scoring(model, "shared_prefix")
        found = [score(model, batch), plain.score(model, batch)]
        shared, alone = (one.logp[one.mask].double() for one in found)
        return shared, alone

    shared, alone = both(setting.dtype)
    model.float()
    exact_shared, exact = both("float32")
    pairs = {
        f"shared and plain rows, {setting.dtype}": (shared, alone),
        f"shared rows, {setting.dtype}, and plain rows, float32": (shared, exact),
        f"plain rows, {setting.dtype} and float32": (alone, exact),
        "shared and plain rows, float32": (exact_shared, exact),
    }
    return {name: _gap(*pair) for name, pair in pairs.items()}


def _gap(first: Tensor, second: Tensor) -> dict[str, float]:
    difference = (first - second).abs()
    return {"largest": float(difference.max()), "mean": float(difference.mean())}
