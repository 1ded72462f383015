"""Training metrics as sums and counts: averaged once, over micro-batches and processes alike."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.collate import PromptBatch
from cwdpo.objectives.base import ObjectiveOutput, ScoredPairs


class StepMetrics:
    """Gathers values between two logging steps.

    Names are TRL's (``rewards/*``, ``logps/*`` are sums per completion), plus ``logps_mean/*`` (per token)
    and ``cooling/*``. A mean of nothing is left out, not zero.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._parts: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._tokens = 0, 0

    def begin_step(self) -> None:
        """Count one optimizer step; the parts of its micro-batches add up to one value."""
        self._steps += 1

    def add(self, batch: PromptBatch, pairs: ScoredPairs, output: ObjectiveOutput) -> None:
        """Take in one micro-batch."""
        for side, scored in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
            self._take(f"logps/{side}", scored.sum_logp)
            self._take(f"logps_mean/{side}", scored.mean_logp)
        for name, value in output.per_pair.items():
            self._take(name, value)
        weights = output.per_pair.get("cooling/weight")
        if weights is not None:
            kinds = [batch.completions[i].kind for i in batch.rejected.tolist()]
            for kind in sorted(set(kinds) - {""}):
                index = [i for i, k in enumerate(kinds) if k == kind]
                self._take(f"cooling/weight/{kind}", weights[index])
        for name, part in output.parts.items():
            self._parts[name] += float(part)

    def add_tokens(self, used: int, padded: int) -> None:
        """Count the tokens that the text tower ran for a micro-batch, without and with padding."""
        self._tokens = self._tokens[0] + used, self._tokens[1] + padded

    def _take(self, name: str, values: Tensor) -> None:
        if values.numel():
            self._values[name].append(values.detach().float().flatten().cpu())

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Averages since the last call; resets."""
        used, padded = self._tokens
        self._parts["tokens/scored"], self._parts["tokens/padded"] = float(used), float(padded)
        gathered, parts = self._gather(accelerator)
        used_share = parts.pop("tokens/scored") / max(parts.pop("tokens/padded"), 1.0)
        logs = {name: value / max(self._steps, 1) for name, value in sorted(parts.items())}
        logs["tokens/padding"] = 1 - used_share
        for name, values in sorted(gathered.items()):
            if name == "cooling/weight":
                logs |= _weight_summary(values)
            else:
                logs[name] = float(values.mean())
        self._values.clear()
        self._parts.clear()
        self._tokens = 0, 0
        self._steps = 0
        return logs

    def _gather(self, accelerator: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        own = {name: torch.cat(values) for name, values in self._values.items()}
        if accelerator is None or accelerator.num_processes == 1:
            return own, dict(self._parts)
        from accelerate.utils import gather_object

        merged: dict[str, list[Tensor]] = defaultdict(list)
        parts: dict[str, float] = defaultdict(float)
        for values, shares in gather_object([(own, dict(self._parts))]):
            for name, value in values.items():
                merged[name].append(value)
            for name, share in shares.items():
                parts[name] += share
        return {name: torch.cat(values) for name, values in merged.items()}, parts


def _weight_summary(weights: Tensor) -> dict[str, float]:
    low, high = torch.quantile(weights, torch.tensor([0.1, 0.9])).tolist()
    return {
        "cooling/weight_mean": float(weights.mean()),
        "cooling/weight_p10": low,
        "cooling/weight_p90": high,
        "cooling/fraction_cooled": float((weights < 0.1).float().mean()),
    }
