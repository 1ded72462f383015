"""Checks before a run that the scores are those that the model itself computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from cwdpo.data.encode.collate import PromptBatch, collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import ModelError
from cwdpo.models.families import family_names
from cwdpo.models.inputs import unwrapped
from cwdpo.models.quantization import is_rounded
from cwdpo.models.sample import forced_logps
from cwdpo.models.shared_attention import Scoring, model_family, shares_prefix, use_scoring
from cwdpo.models.turns import in_turns
from cwdpo.records import Example
from cwdpo.scoring import plain
from cwdpo.scoring.score import score
from cwdpo.scoring.token_logp import TokenScores

logger = logging.getLogger("cwdpo")
MOST_EXACT, MOST_ROUNDED = 1e-3, 0.1
"""Largest allowed mean difference of two ways of scoring (nats per token), fp32 and bf16; known errors give >= 0.2."""

LOOKED_AT = 4096


@torch.no_grad()
def check_scoring(model: nn.Module, encoder: Encoder, examples: Sequence[Example], scoring: Scoring) -> None:
    """Compare two ways of scoring on one or two rows before the run uses them.

    Known family: shared-prefix and plain scores are compared, because a new release of transformers may change a
    model. If they differ, ``auto`` falls back to plain scoring, with a line in the log. Unknown family: plain scores
    are compared with those of the model's own generation code.

    Args:
        model: the policy; its mode is restored.
        encoder: the checkpoint's encoder.
        examples: the rows to choose from.
        scoring: the recipe's ``model.scoring``.

    Raises:
        ModelError: the scores of an unknown family differ; or shared-prefix scores differ and ``model.scoring`` is
            ``shared_prefix``.
    """
    known = model_family(model) is not None
    if known and not shares_prefix(model):
        return
    readable = encoder.readable(_different(examples), 1 if known else 2)
    encoded = encoder.encode_all(readable, "rejected", require_negative=False)[0]
    if not encoded:
        return  # encoding the data later reports the errors
    batch = collate(encoded)
    was_training = model.training
    model.eval()
    with in_turns(model):
        wanted = plain.score(model, batch) if known else _tried(model, batch, plain.score)
        ours = score(model, batch) if known else _tried(model, batch, _own)
    model.train(was_training)
    rounded = is_rounded(model) or torch.is_autocast_enabled(wanted.logp.device.type)
    difference = float((ours.logp - wanted.logp).abs().sum() / wanted.mask.sum())
    finite = bool(wanted.logp.isfinite().all())
    if difference <= (MOST_ROUNDED if rounded else MOST_EXACT) or (known and not finite):
        return
    if not known:
        raise ModelError(
            f"{_unknown(model)}, and on {len(encoded)} rows of the data its scores differ from the model's own "
            f"generation by {difference:.2g} nats per token, so the loss would be wrong; "
            f"known: {', '.join(family_names())}"
        )
    problem = f"its log-probabilities differ from those of plain scoring (by {difference:.2g} nats per token)"
    if scoring == "shared_prefix":
        raise ModelError(f"model.scoring: shared_prefix is not possible: {problem}; set it to auto or plain")
    logger.warning("scoring is plain, one full sequence per completion: %s", problem)
    use_scoring(model, "plain")


def spread(examples: Sequence[Example], n: int = LOOKED_AT) -> list[Example]:
    """At most about ``n`` rows, evenly spaced: of a large set, it is enough to choose from these."""
    return [examples[i] for i in range(0, len(examples), max(1, len(examples) // n))]


def _different(examples: Sequence[Example]) -> Iterator[Example]:
    """The examples, reordered: first one with images or videos, then one with another number, then the others."""
    first = next((e for e in examples if e.pictured), examples[0] if examples else None)
    second = next((e for e in examples if first is not None and _counts(e) != _counts(first)), None)
    ahead = [e for e in (first, second) if e is not None]
    return chain(ahead, (e for e in examples if not any(e is one for one in ahead)))


def _counts(example: Example) -> tuple[int, int]:
    return len(example.images), len(example.videos)


def _tried(
    model: nn.Module, batch: PromptBatch, way: Callable[[nn.Module, PromptBatch], TokenScores]
) -> TokenScores:
    """Scores of an unknown family; any error of its code is a reason to refuse it."""
    try:
        return way(model, batch)
    except Exception as error:
        raise ModelError(
            f"{_unknown(model)}, and it cannot be scored like the known ones ({type(error).__name__}: "
            f"{str(error)[:200]}); known: {', '.join(family_names())}"
        ) from error


def _own(model: nn.Module, batch: PromptBatch) -> TokenScores:
    """Token log-probabilities from the model's own generation code, completion by completion."""
    own = batch.completion_prompt.tolist()
    rows = [forced_logps(model, batch.prompts[p], c.ids) for p, c in zip(own, batch.completions, strict=True)]
    logp = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(r) for r in rows], device=logp.device)
    return TokenScores(logp, torch.arange(logp.shape[1], device=logp.device)[None] < lengths[:, None])


def _unknown(model: nn.Module) -> str:
    return f"model type {unwrapped(model).config.model_type!r} is not known"
