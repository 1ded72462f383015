"""The influence of one update on held-out responses, computed with forward-mode differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.objectives.base import Objective
from cwdpo.probes.base import OneStep
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import scored_pairs
from cwdpo.scoring.token_logp import TokenScores

LARGEST = 0.01
"""eta of an update is chosen so that its largest predicted change of a mean_logp is this many nats per token."""


def one_step(
    model: nn.Module,
    observed: PromptBatch,
    kinds: Sequence[str],
    updates: Sequence[PromptBatch],
    objective: Objective,
    largest: float = LARGEST,
) -> OneStep:
    """Predict and measure the effect of one step of plain gradient descent, for each update; the model is not changed.

    Cost for U updates: U forward and backward passes over a training batch, and over the observed responses 1 + U
    forward passes and U forward-mode passes (each about two forward passes). Memory: two copies of the trained
    parameters (with LoRA, of the adapters).

    Args:
        model: the policy, not sharded; an update changes the parameters that require a gradient.
        observed: held-out prompts with N completions.
        kinds: the N response types.
        updates: U training batches, one per update.
        objective: its loss is minimised; if it needs reference values, the batches must contain them.
        largest: the largest predicted change that each update may make, in nats per token.
    """
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def read(parameters: Mapping[str, Tensor]) -> Tensor:
        tokens = functional_call(
            _Scores(model), {f"model.{n}": p for n, p in parameters.items()}, (observed,)
        )
        return tokens.logp.sum(1) / tokens.mask.sum(1)

    was_training = model.training
    model.eval()
    try:
        # The fused attention kernels have no forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # For the derivative of some operators torch calls a function that it has deprecated itself.
            warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
            scores = plain.score(model, observed)
            before = scores.logp.sum(1) / scores.mask.sum(1)
            belief = (2 * (1 - scores.logp.exp()) * scores.mask).sum(1) / scores.mask.sum(1)
            rows = []
            for batch in updates:
                # `change` is the derivative of each mean_logp along the negative gradient; eta scales it to `largest`.
                gradient, residual = _gradient(model, batch, objective, trained)
                _, change = jvp(read, (trained,), ({n: -g for n, g in gradient.items()},))
                peak = float(change.abs().max())
                eta = largest / peak if peak > 0 else 0.0
                moved = read({n: p - eta * gradient[n] for n, p in trained.items()})
                rows.append((eta * change, moved - before, change.new_tensor(eta), residual))
    finally:
        model.train(was_training)
    predicted, actual, eta, residual = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
    return OneStep(tuple(kinds), predicted, actual, eta, belief.cpu(), residual)


class _Scores(nn.Module):
    """Scoring as the forward of a module: ``functional_call`` can only replace the parameters of a forward call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PromptBatch) -> TokenScores:
        return plain.score(self.model, batch)


@torch.enable_grad()
def _gradient(
    model: nn.Module, batch: PromptBatch, objective: Objective, trained: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """d loss / d parameter for the trained parameters, and the L1 norm of d loss / d logits."""
    tokens = plain.score(model, batch, stats=objective.token_stats)
    loss = objective(scored_pairs(batch, tokens)).loss
    named = dict(model.named_parameters())
    wanted = [tokens.logp, *(named[n] for n in trained)]
    by_token, *found = torch.autograd.grad(loss, wanted, allow_unused=True)
    gradient = {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)
    }
    push = (by_token.abs() * 2 * (1 - tokens.logp.detach().exp()) * tokens.mask).sum()
    return gradient, push
