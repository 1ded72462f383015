"""The one-step influence of training examples on held-out responses, by forward-mode differentiation."""

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
"""The step is as long as makes the largest predicted change of a mean_logp this many nats per token."""


def one_step(
    model: nn.Module,
    observed: PromptBatch,
    kinds: Sequence[str],
    updates: Sequence[PromptBatch],
    objective: Objective,
    largest: float = LARGEST,
) -> OneStep:
    """Predict and take one step of plain gradient descent for each update; the model is left as it is.

    Cost for U updates: U forward and backward passes of an update, and over the observed responses 1 + U
    forward passes and U forward-mode passes (about two forwards each). Memory: two copies of the trained parameters.
    With LoRA the trained parameters are the adapters alone.

    Args:
        model: the policy, not sharded; parameters that require a gradient move.
        observed: held-out prompts with N completions.
        kinds: N response types.
        updates: training batches, each one step.
        objective: its loss is descended; reference values must be in the batches where it needs them.
        largest: nats per token of the largest predicted change of each step.
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
        # The fused kernels know no forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # torch writes the derivative of some operators with a function of its own that it has deprecated.
            warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
            scores = plain.score(model, observed)
            before = scores.logp.sum(1) / scores.mask.sum(1)
            belief = (2 * (1 - scores.logp.exp()) * scores.mask).sum(1) / scores.mask.sum(1)
            rows = []
            for batch in updates:
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
    """``functional_call`` calls a module's forward; scoring calls the model itself."""

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
