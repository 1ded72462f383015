"""Training metrics, collected as values and sums and averaged once over micro-batches and processes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, get_args

import torch
from torch import Tensor

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.objectives.base import ObjectiveOutput, ScoredPairs
from cwdpo.records import Origin
from cwdpo.scoring.token_logp import TokenScores
from cwdpo.trainer.gradient import gradient_metrics, gradient_sums


class StepMetrics:
    """Collects values between two logging steps.

    Names are TRL's (``rewards/*``; ``logps/*`` is sum_logp in nats), plus ``logps_mean/*`` (mean_logp, nats per token)
    and ``cooling/*``. A metric without values is left out.

    Args:
        by_origin: also log, for the negatives of each origin, ``negatives/<origin>/*``: number and share of the pairs,
            mean_logp under the policy (nats per token), and cooling weight.
    """

    def __init__(self, by_origin: bool = False) -> None:
        self._by_origin = by_origin
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._parts: dict[str, float] = defaultdict(float)
        self._gradient: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._tokens = 0, 0

    def begin_step(self) -> None:
        """Count one optimizer step; the loss parts of its micro-batches are added up to one value."""
        self._steps += 1

    def add(
        self, batch: PromptBatch, tokens: TokenScores, pairs: ScoredPairs, output: ObjectiveOutput
    ) -> None:
        """Add the values of one micro-batch; must be called before its backward pass."""
        for name, total in gradient_sums(batch, tokens, pairs, output).items():
            self._gradient[name] += total
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
        if pairs.image_side is not None:
            self._take_sides(pairs, output)
        if self._by_origin:
            self._take_origins(batch, pairs, weights)
        if any(batch.sources):
            self._take_sources(batch, pairs, output)
        for name, part in output.parts.items():
            self._parts[name] += float(part)

    def add_tokens(self, used: int, padded: int) -> None:
        """Count the tokens that the language model processed for a micro-batch, without and with padding."""
        self._tokens = self._tokens[0] + used, self._tokens[1] + padded

    def _take_sides(self, pairs: ScoredPairs, output: ObjectiveOutput) -> None:
        """Values of image-side pairs and of the others (text-side) apart; their share is of all pairs logged here."""
        assert pairs.image_side is not None
        self._take("pairs/image_side", pairs.image_side)
        for side, own in (("image", pairs.image_side), ("text", ~pairs.image_side)):
            self._take(f"logps_mean/rejected/{side}", pairs.rejected.mean_logp[own])
            for name in ("rewards/margins", "rewards/accuracies"):
                if name in output.per_pair:
                    self._take(f"{name}/{side}", output.per_pair[name][own])

    def _take_sources(self, batch: PromptBatch, pairs: ScoredPairs, output: ObjectiveOutput) -> None:
        """Values of each source of a mixture; its share is of the prompts that are logged here."""
        pair_prompt = batch.pair_prompt.tolist()
        for name in sorted(set(batch.sources)):
            prompts = torch.tensor([source == name for source in batch.sources])
            own = prompts[pair_prompt].to(pairs.rejected.mean_logp.device)
            self._take(f"source/{name}/share", prompts)
            self._take(f"source/{name}/logps_mean/chosen", pairs.chosen.mean_logp[prompts.to(own.device)])
            self._take(f"source/{name}/logps_mean/rejected", pairs.rejected.mean_logp[own])
            for value in ("rewards/margins", "rewards/accuracies", "cooling/weight"):
                if value in output.per_pair:
                    self._take(f"source/{name}/{value}", output.per_pair[value][own])

    def _take_origins(self, batch: PromptBatch, pairs: ScoredPairs, weights: Tensor | None) -> None:
        origins = [batch.completions[i].origin for i in batch.rejected.tolist()]
        for origin in get_args(Origin):
            own = torch.tensor([o == origin for o in origins], dtype=torch.bool)  # also without negatives
            self._take(f"negatives/{origin}/share", own)
            self._take(
                f"negatives/{origin}/logps_mean",
                pairs.rejected.mean_logp[own.to(pairs.rejected.mean_logp.device)],
            )
            if weights is not None:
                self._take(f"negatives/{origin}/weight", weights[own.to(weights.device)])

    def _take(self, name: str, values: Tensor) -> None:
        if values.numel():
            self._values[name].append(values.detach().float().flatten().cpu())

    def flush(self, accelerator: Any) -> dict[str, float]:
        """The averages since the last call, over all processes; then start again."""
        used, padded = self._tokens
        self._parts["tokens/scored"], self._parts["tokens/padded"] = float(used), float(padded)
        gathered, parts, gradient = self._gather(accelerator)
        used_share = parts.pop("tokens/scored") / max(parts.pop("tokens/padded"), 1.0)
        logs = {name: value / max(self._steps, 1) for name, value in sorted(parts.items())}
        logs["tokens/padding"] = 1 - used_share
        for name, values in sorted(gathered.items()):
            if name == "cooling/weight":
                logs |= _weight_summary(values)
            else:
                logs[name] = float(values.mean())
            if name.startswith("negatives/") and name.endswith("/share"):
                logs[name.removesuffix("share") + "n"] = float(values.sum())
        logs |= gradient_metrics(gradient)
        self._values.clear()
        self._parts.clear()
        self._tokens = 0, 0
        self._gradient.clear()
        self._steps = 0
        return logs

    def _gather(self, accelerator: Any) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
        own = {name: torch.cat(values) for name, values in self._values.items()}
        if accelerator is None or accelerator.num_processes == 1:
            return own, dict(self._parts), dict(self._gradient)
        from accelerate.utils import gather_object

        merged: dict[str, list[Tensor]] = defaultdict(list)
        sums: tuple[dict[str, float], dict[str, float]] = (defaultdict(float), defaultdict(float))
        for values, *others in gather_object([(own, dict(self._parts), dict(self._gradient))]):
            for name, value in values.items():
                merged[name].append(value)
            for total, other in zip(sums, others, strict=True):
                for name, share in other.items():
                    total[name] += share
        return {name: torch.cat(values) for name, values in merged.items()}, *sums


def _weight_summary(weights: Tensor) -> dict[str, float]:
    low, high = torch.quantile(weights, torch.tensor([0.1, 0.9])).tolist()
    return {
        "cooling/weight_mean": float(weights.mean()),
        "cooling/weight_p10": low,
        "cooling/weight_p90": high,
        "cooling/fraction_cooled": float((weights < 0.1).float().mean()),
        "cooling/fraction_between": float(((weights >= 0.1) & (weights <= 0.9)).float().mean()),
    }
