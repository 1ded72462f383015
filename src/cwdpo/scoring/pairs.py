"""Token scores of a batch -> :class:`ScoredPairs`; and the reference pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.objectives.base import Scored, ScoredPairs, StepTotals
from cwdpo.scoring.ahead import batches_ahead
from cwdpo.scoring.score import score
from cwdpo.scoring.token_logp import TokenScores


def span_mask(batch: PromptBatch, tokens: TokenScores) -> Tensor:
    """[N, C] True on the tokens of each completion's differing span."""
    position = torch.arange(tokens.mask.shape[1], device=tokens.mask.device)[None]
    first, last = torch.tensor([c.span for c in batch.completions], device=tokens.mask.device).T[:, :, None]
    return (position >= first) & (position < last) & tokens.mask


def scored_pairs(batch: PromptBatch, tokens: TokenScores, totals: StepTotals | None = None) -> ScoredPairs:
    """Sum the token scores [N, C] over each completion and split the sums into B chosen and P rejected.

    Reference values are passed on if every completion has one, reward margins if every negative has one.
    """
    device = tokens.logp.device
    references = [(c.reference_sum_logp, c.reference_span_sum_logp) for c in batch.completions]
    known = all(value is not None for pair in references for value in pair)
    reference, span_reference = (
        torch.tensor(references, dtype=torch.float32, device=device).T if known else (None, None)
    )
    margins = [c.reward_margin for c in batch.completions]
    has_margins = len(batch.rejected) > 0 and all(margins[i] is not None for i in batch.rejected.tolist())
    span = span_mask(batch, tokens)
    sides = [batch.completions[i].prompt is not None for i in batch.rejected.tolist()]
    everything = Scored(
        sum_logp=tokens.logp.sum(1),
        n_tokens=tokens.mask.sum(1),
        reference_sum_logp=reference,
        span_sum_logp=(tokens.logp * span).sum(1),
        span_reference_sum_logp=span_reference,
        stats={name: values.sum(1) for name, values in tokens.stats.items()},
        token_logp=tokens.logp,
        token_mask=tokens.mask,
        token_span=span,
        reward_margin=torch.tensor([m or 0.0 for m in margins], device=device) if has_margins else None,
    )
    return ScoredPairs(
        select(everything, batch.chosen.to(device)),
        select(everything, batch.rejected.to(device)),
        batch.pair_prompt.to(device),
        totals,
        torch.tensor(sides, device=device) if any(sides) else None,
    )


def select(scored: Scored, index: Tensor) -> Scored:
    """The scores of the completions at ``index`` [n]."""
    stats = {name: values[index] for name, values in scored.stats.items()}
    tensors = {name: value[index] for name, value in vars(scored).items() if isinstance(value, Tensor)}
    return replace(scored, **tensors, stats=stats)


def with_reference(example: EncodedExample, values: Sequence[tuple[float, float]]) -> EncodedExample:
    """The example with the reference model's log-probabilities.

    Args:
        example: as the encoder made it.
        values: ``(sum_logp, span_sum_logp)`` in nats: of chosen, then of each negative.
    """
    chosen, *negatives = (
        replace(c, reference_sum_logp=total, reference_span_sum_logp=span)
        for c, (total, span) in zip(example.completions, values, strict=True)
    )
    return replace(example, chosen=chosen, negatives=tuple(negatives))


@torch.no_grad()
def reference_pass(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda n: None,
) -> list[EncodedExample]:
    """Score the examples with the reference model and store its log-likelihoods in them, as reference values.

    Examples of similar length are scored together to save padding; the result keeps the order of the input.

    Args:
        model: the reference model.
        examples: the examples to score.
        batch_size: examples per forward pass.
        progress: called with the number of examples after each forward pass.
    """
    was_training = model.training
    model.eval()
    done: dict[int, EncodedExample] = {}
    order = sorted(range(len(examples)), key=lambda i: (examples[i].n_tokens, i))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = batches_ahead(model, (collate([examples[i] for i in index]) for index in parts))
    for index, batch in zip(parts, batches, strict=True):
        tokens = score(model, batch)
        sums = tokens.logp.double().sum(1).tolist()
        spans = (tokens.logp.double() * span_mask(batch, tokens)).sum(1).tolist()
        values = iter(zip(sums, spans, strict=True))
        for i in index:
            own = [next(values) for _ in range(1 + len(examples[i].negatives))]
            done[i] = with_reference(examples[i], own)
        progress(len(index))
    model.train(was_training)
    return [done[i] for i in range(len(examples))]
