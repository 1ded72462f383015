"""Log-probabilities of completion tokens at the model's own head, without the logits of a whole batch.

The head's ``forward`` is replaced for one call: it keeps the hidden states that predict completion
tokens, goes through the vocabulary in chunks (recomputed in backward), and returns a few numbers a
token. The model is called as it is, so wrappers (peft, DDP, FSDP) see an ordinary forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cwdpo.errors import ModelError
from cwdpo.models.inputs import unwrapped

CHUNK_VALUES = 1 << 24
"""Most values of one chunk of logits: 2^24 fp32 values are 64 MiB."""


@dataclass(frozen=True)
class TokenScores:
    """Per-token results of N completions, right-padded to C tokens.

    Attributes:
        logp: [N, C] log-probability of each token in nats, 0 where padded; carries the gradient.
        mask: [N, C] True on completion tokens.
        uniform_logp: [N, C] mean over the vocabulary of the log-probabilities (for label smoothing);
            carries the gradient.
        collision_logp: [N, C] log-probability that two draws of the token agree, detached; where asked.
        entropy: [N, C] in nats, detached; with ``top1`` (largest probability) and ``correct``
            (whether that was the token) only where details were asked, else ``None``.
        whole: [W, V] log-probabilities over the vocabulary, detached, of the tokens of completions that were asked
            for, completion by completion; else ``None``.
    """

    logp: Tensor
    mask: Tensor
    uniform_logp: Tensor | None = None
    collision_logp: Tensor | None = None
    entropy: Tensor | None = None
    top1: Tensor | None = None
    correct: Tensor | None = None
    whole: Tensor | None = None


@dataclass(frozen=True)
class HeadRequest:
    """Which hidden states to read and what to compute: M tokens in all.

    Attributes:
        rows, positions: [M] where each predicting hidden state stands in the [rows, length] batch.
        targets: [M] the token each of them must predict.
        smoothing: also the mean log-probability over the vocabulary.
        details: also entropy, top-1 probability and correctness (no gradient).
        collision: also ``log sum over the vocabulary of p^2`` (no gradient), for WPO.
        whole: [M] True where the log-probabilities over the vocabulary are wanted themselves (for divergences on
            few tokens; without gradient). They are put into ``found``, part by part.
    """

    rows: Tensor
    positions: Tensor
    targets: Tensor
    smoothing: bool = False
    details: bool = False
    collision: bool = False
    whole: Tensor | None = None
    found: list[Tensor] = field(default_factory=list)


def _token_stats(logp: Tensor, targets: Tensor, request: HeadRequest) -> Tensor:
    """[M, columns] from log-probabilities over the vocabulary [M, V] and the tokens [M]; see :func:`unpack`."""
    columns = [logp.gather(-1, targets[:, None])[:, 0]]
    if request.smoothing:
        columns.append(logp.mean(-1))
    if request.collision:
        columns.append((2 * logp.detach()).logsumexp(-1))
    if request.details:
        fixed = logp.detach()
        top1, best = fixed.max(-1)
        columns += [-(fixed.exp() * fixed).sum(-1), top1.exp(), (best == targets).to(fixed.dtype)]
    return torch.stack(columns, dim=-1)


def _through_head(head: Callable[[Tensor], Tensor], hidden: Tensor, request: HeadRequest) -> Tensor:
    selected = hidden[request.rows.to(hidden.device), request.positions.to(hidden.device)]
    columns = [selected, request.targets.to(hidden.device)]
    if request.whole is not None:
        columns.append(request.whole.to(hidden.device))
    vocabulary = _vocabulary_size(head, selected)
    size = max(1, CHUNK_VALUES // vocabulary)

    def one(part: Tensor, wanted: Tensor, kept: Tensor | None = None) -> Tensor:
        logp = head(part).float().log_softmax(-1)
        if kept is not None:
            request.found.append(logp[kept].detach())
        return _token_stats(logp, wanted, request)

    if len(selected) <= size:
        return one(*columns)
    pieces = zip(*(column.split(size) for column in columns), strict=True)
    if torch.is_grad_enabled() and selected.requires_grad:
        return torch.cat([checkpoint(one, *piece, use_reentrant=False) for piece in pieces])
    return torch.cat([one(*piece) for piece in pieces])


def _vocabulary_size(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    owner = getattr(head, "__self__", None)
    size = getattr(owner, "out_features", None)
    if size is None:
        with torch.no_grad():
            size = head(hidden[:1]).shape[-1]
    return int(size)


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to logits.

    Raises:
        ModelError: the model has none, or changes its logits behind the head.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(inner).__name__} has no output head: a causal vision-language model is needed"
        )
    text = inner.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
        if getattr(text, name, neutral) not in (neutral, None):
            raise ModelError(
                f"{type(inner).__name__} changes its logits behind the head ({name} = {getattr(text, name)}): "
                "its token log-probabilities cannot be read at the head yet"
            )
    assert isinstance(head, nn.Module)
    return head


@contextmanager
def scoring_head(model: nn.Module, request: HeadRequest) -> Iterator[None]:
    """While active, the model's ``logits`` are the request's numbers, [M, columns], instead of logits."""
    head = output_head(model)
    original = head.forward
    hooked = vars(head).get("forward")  # accelerate's device maps hang theirs on the instance
    head.forward = lambda hidden: _through_head(original, hidden, request)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
        if hooked is not None:
            head.forward = hooked


def run(model: nn.Module, inputs: Mapping[str, Any], request: HeadRequest) -> Tensor:
    """Call the model with its head answering ``request``: [M, columns]."""
    with scoring_head(model, request):
        logits = model(**inputs, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def unpack(stats: Tensor, request: HeadRequest, lengths: list[int]) -> TokenScores:
    """Scatter [M, columns] back to [N, C], completion by completion."""
    n, longest = len(lengths), max(lengths)
    device = stats.device
    mask = torch.arange(longest, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
    columns = []
    for column in stats.unbind(-1):
        columns.append(column.new_zeros(n, longest).masked_scatter(mask, column))
    logp, *rest = columns
    uniform = rest.pop(0) if request.smoothing else None
    collision = rest.pop(0) if request.collision else None
    entropy, top1, correct = rest if request.details else (None, None, None)
    whole = None if request.whole is None else torch.cat(request.found)
    return TokenScores(logp, mask, uniform, collision, entropy, top1, correct, whole)
