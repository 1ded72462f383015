"""Log-probabilities of completion tokens, computed inside the model's output head, without the logits of a batch.

During one call the head's ``forward`` is replaced. The replacement selects the hidden states that predict completion
tokens, computes their logits in chunks (recomputed in backward), and returns a few numbers per token. The model itself
is called as usual, so wrappers (peft, DDP, FSDP) see an ordinary forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.errors import ModelError
from cwdpo.models.inputs import unwrapped
from cwdpo.models.shared_attention import model_family
from cwdpo.models.turns import take_turn
from cwdpo.objectives.base import TokenStat
from cwdpo.scoring.apart import parts_of
from cwdpo.scoring.token_stats import resolve

_CAP = "final_logit_softcapping"
CHUNK_VALUES = 1 << 24
"""Largest number of logits in a chunk: 2^24 fp32 values are 64 MiB."""


@dataclass(frozen=True)
class TokenScores:
    """Per-token results of N completions, right-padded to C tokens.

    Attributes:
        logp: [N, C] log-probability of each token in nats, 0 on padding; carries the gradient.
        mask: [N, C] True on completion tokens, False on padding.
        stats: the requested statistics by name, each [N, C], 0 on padding.
        whole: [W, V] detached log-probabilities over the vocabulary, for the W tokens of the requested completions,
            completion by completion; ``None`` if none were requested.
    """

    logp: Tensor
    mask: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Tensor | None = None


@dataclass(frozen=True)
class HeadRequest:
    """Which hidden states to read, and what to compute from them, for M tokens.

    Attributes:
        rows, positions: [M] the indices, in the batch [rows, length], of the hidden states that predict the tokens.
        targets: [M] the ids of the tokens.
        stats: statistics to compute for each token, by name, see :mod:`cwdpo.scoring.token_stats`.
        whole: [M] True for the tokens whose log-probabilities over the vocabulary are kept (few tokens, without
            gradient). They are appended to ``distributions``, chunk by chunk.
    """

    rows: Tensor
    positions: Tensor
    targets: Tensor
    stats: Mapping[str, TokenStat] = field(default_factory=dict)
    whole: Tensor | None = None
    distributions: list[Tensor] = field(default_factory=list)


def _columns(logp: Tensor, targets: Tensor, request: HeadRequest) -> Tensor:
    """[M, 1 + statistics]: log-probability and statistics of each token, from ``logp`` [M, V] and ``targets`` [M]."""
    columns = [logp.gather(-1, targets[:, None])[:, 0]]
    columns += [stat(logp, targets) for stat in request.stats.values()]
    return torch.stack(columns, dim=-1)


def _through_head(head: Callable[[Tensor], Tensor], hidden: Tensor, request: HeadRequest) -> Tensor:
    selected = hidden[request.rows.to(hidden.device), request.positions.to(hidden.device)]
    columns = [selected, request.targets.to(hidden.device)]
    if request.whole is not None:
        columns.append(request.whole.to(hidden.device))
    vocabulary = _vocabulary_size(head, selected)
    size = max(1, CHUNK_VALUES // vocabulary)

    # Only one chunk of logits is in memory at a time. With a gradient each chunk is checkpointed: its logits are freed
    # after the forward pass and computed again in backward.
    def one(part: Tensor, wanted: Tensor, kept: Tensor | None = None) -> Tensor:
        logp = head(part).float().log_softmax(-1)
        if kept is not None:
            request.distributions.append(logp[kept].detach())
        return _columns(logp, wanted, request)

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
        ModelError: the model has none, or changes its logits after the head.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(inner).__name__} has no output head: a causal vision-language model is needed"
        )
    text = inner.config.get_text_config()
    family = model_family(inner)
    known = {_CAP} if family is not None and family.caps_logits else set()
    for name, neutral in ((_CAP, None), ("logit_scale", 1), ("logits_scaling", 1)):
        if name not in known and getattr(text, name, neutral) not in (neutral, None):
            raise ModelError(
                f"{type(inner).__name__} changes its logits after the head ({name} = {getattr(text, name)}): "
                "the log-probabilities computed at the head would be wrong, so this model is not supported"
            )
    assert isinstance(head, nn.Module)
    return head


@contextmanager
def scoring_head(model: nn.Module, request: HeadRequest) -> Iterator[None]:
    """While active, the model returns the numbers of the request [M, columns] in place of its logits."""
    head = output_head(model)
    original = head.forward
    hooked = vars(head).get("forward")  # accelerate's device maps hang theirs on the instance
    text: Any = unwrapped(model).config.get_text_config()
    cap = getattr(text, _CAP, None)

    def logits(hidden: Tensor) -> Tensor:
        found: Tensor = original(hidden)
        return found if cap is None else cap * torch.tanh(found / cap)

    head.forward = lambda hidden: _through_head(original if cap is None else logits, hidden, request)  # type: ignore[method-assign]
    if cap is not None:
        setattr(text, _CAP, None)  # or the model would cap the numbers that stand for its logits
    try:
        yield
    finally:
        if cap is not None:
            setattr(text, _CAP, cap)
        del head.forward
        if hooked is not None:
            head.forward = hooked


def score_rows(
    model: nn.Module,
    batch: PromptBatch,
    lay_out: Callable[[nn.Module, PromptBatch], tuple[dict[str, Any], HeadRequest]],
    stats: Iterable[str | TokenStat] = (),
    whole: Tensor | None = None,
) -> TokenScores:
    """Score a batch in the row layout of ``lay_out``; all layouts use this function.

    Args:
        model: a causal vision-language model, bare or wrapped.
        batch: B prompts with N completions.
        lay_out: builds model inputs and the request from the model and the batch.
        stats, whole: see :func:`cwdpo.scoring.score.score`.
    """
    stats = resolve(stats)
    parts = parts_of(model, batch)
    scores = [
        _score_part(model, part, lay_out, stats, None if whole is None else whole[index])
        for index, part in parts
    ]
    if len(parts) == 1:
        return scores[0]
    order = torch.cat([index for index, _ in parts]).argsort()
    return _in_order(scores, order, whole)


def _score_part(
    model: nn.Module,
    batch: PromptBatch,
    lay_out: Callable[[nn.Module, PromptBatch], tuple[dict[str, Any], HeadRequest]],
    stats: Mapping[str, TokenStat],
    whole: Tensor | None,
) -> TokenScores:
    inputs, request = lay_out(model, batch)
    lengths = [len(c.ids) for c in batch.completions]
    tokens = None if whole is None else whole.repeat_interleave(torch.tensor(lengths))
    request = replace(request, stats=stats, whole=tokens)
    return unpack(run(model, inputs, request), request, lengths)


def _in_order(scores: Sequence[TokenScores], order: Tensor, kept: Tensor | None) -> TokenScores:
    """The scores of several calls as those of one batch, its completions in ``order``; ``kept`` as ``whole`` above."""
    longest = max(s.mask.shape[1] for s in scores)

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(v, (0, longest - v.shape[1])) for v in values])[order.to(values[0].device)]

    mask, whole = joined([s.mask for s in scores]), None
    if kept is not None:
        found = torch.cat([s.whole for s in scores if s.whole is not None])
        lengths = mask.sum(1).cpu() * kept.cpu()
        blocks = found.split(lengths[order.argsort()].tolist())
        whole = torch.cat([blocks[i] for i in order.tolist()])
    stats = {name: joined([s.stats[name] for s in scores]) for name in scores[0].stats}
    return TokenScores(joined([s.logp for s in scores]), mask, stats, whole)


def run(model: nn.Module, inputs: Mapping[str, Any], request: HeadRequest) -> Tensor:
    """Call the model with the replaced head; returns the numbers of the request, [M, columns]."""
    take_turn(model, inputs)  # before the head is replaced: a silent row needs it as it is
    with scoring_head(model, request):
        logits = model(**inputs, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def unpack(stats: Tensor, request: HeadRequest, lengths: list[int]) -> TokenScores:
    """Turn the numbers [M, columns] into per-token scores [N, C]; ``lengths`` are the N completion lengths."""
    n, longest = len(lengths), max(lengths)
    device = stats.device
    mask = torch.arange(longest, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
    columns = []
    for column in stats.unbind(-1):
        columns.append(column.new_zeros(n, longest).masked_scatter(mask, column))
    logp, *rest = columns
    whole = None if request.whole is None else torch.cat(request.distributions)
    return TokenScores(logp, mask, dict(zip(request.stats, rest, strict=True)), whole)
