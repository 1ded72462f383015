"""Which responses the gradient of a step comes from, computed from the step's own forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.objectives.base import ObjectiveOutput, ScoredPairs
from cwdpo.scoring.token_logp import TokenScores

EASY = 2.0
"""A negative is easy if its mean_logp is this many nats per token below that of its chosen response."""


def pushes(loss: Tensor, tokens: TokenScores) -> Tensor:
    """[N] L1 norm of d loss / d logits of each completion, summed over its tokens.

    The gradient of the loss in a token's logits is ``c * (e - p)``, where ``c`` is the derivative of the loss by the
    token's log-probability, and the L1 norm of ``e - p`` is ``2 * (1 - p(token))``. So only the step from the loss to
    the log-probabilities is differentiated, without another pass through the model. The label-smoothed term of
    ``sft_smoothed`` does not depend on these log-probabilities alone and is not counted.
    """
    if not loss.requires_grad:
        return tokens.logp.new_zeros(len(tokens.logp))
    (c,) = torch.autograd.grad(loss, tokens.logp, retain_graph=True, allow_unused=True)
    if c is None:
        return tokens.logp.new_zeros(len(tokens.logp))
    return (c.abs() * 2 * (1 - tokens.logp.detach().exp()) * tokens.mask).sum(1)


def gradient_sums(
    batch: PromptBatch, tokens: TokenScores, pairs: ScoredPairs, output: ObjectiveOutput
) -> dict[str, float]:
    """Sums over one micro-batch, from which :func:`gradient_metrics` computes means and shares."""
    push, logp = pushes(output.loss, tokens), tokens.logp.detach()
    residual = ((1 - logp.exp()) * tokens.mask).sum(1)
    length = tokens.mask.sum(1)
    chosen, rejected = batch.chosen.to(push.device), batch.rejected.to(push.device)
    sums: dict[str, float] = defaultdict(float)
    for side, index in (("chosen", chosen), ("rejected", rejected)):
        sums[f"push/{side}"] = float(push[index].sum())
        sums[f"residual/{side}"] = float(residual[index].sum())
        sums[f"tokens/{side}"] = float(length[index].sum())
    own = pairs.chosen.mean_logp.detach()[pairs.prompt]
    easy = pairs.rejected.mean_logp.detach() < own - EASY
    sums["push/easy"] = float(push[rejected][easy].sum())
    sums["pairs"], sums["easy"] = float(len(rejected)), float(easy.sum())
    sums["gap"] = float((own - pairs.rejected.mean_logp.detach()).sum())
    margins = output.per_pair.get("rewards/margins")
    if margins is not None:
        a = margins.sigmoid()
        sums["vulnerable"], sums["judged"] = float(((a >= 0.8) & (a <= 0.99)).sum()), float(len(a))
        sums["saturated"] = float((a > 0.99).sum())
    return dict(sums)


def gradient_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """``gradient/*`` and ``pairs/*`` over the steps since the last log; a metric whose denominator is 0 is left out.

    ``pairs/gap`` is the mean of mean_logp(chosen) - mean_logp(rejected), in nats per token.
    """
    push = sums.get("push/chosen", 0.0) + sums.get("push/rejected", 0.0)
    parts = {
        "gradient/rejected_share": (sums.get("push/rejected", 0.0), push),
        "gradient/easy_share": (sums.get("push/easy", 0.0), sums.get("push/rejected", 0.0)),
        "gradient/residual_chosen": (sums.get("residual/chosen", 0.0), sums.get("tokens/chosen", 0.0)),
        "gradient/residual_rejected": (sums.get("residual/rejected", 0.0), sums.get("tokens/rejected", 0.0)),
        "gradient/vulnerable": (sums.get("vulnerable", 0.0), sums.get("judged", 0.0)),
        "gradient/saturated": (sums.get("saturated", 0.0), sums.get("judged", 0.0)),
        "pairs/easy": (sums.get("easy", 0.0), sums.get("pairs", 0.0)),
        "pairs/gap": (sums.get("gap", 0.0), sums.get("pairs", 0.0)),
    }
    return {name: value / whole for name, (value, whole) in parts.items() if whole > 0}
