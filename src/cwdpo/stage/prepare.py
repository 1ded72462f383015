"""What every preference run needs before its first step: usable examples, reference values, a calibration."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedExample, Encoder
from cwdpo.errors import DataError, ModelError
from cwdpo.models.sample import sample
from cwdpo.models.shared_attention import Scoring, shares_prefix, use_scoring
from cwdpo.objectives.base import Objective
from cwdpo.objectives.cw_dpo import CwDpo
from cwdpo.records import Example
from cwdpo.scoring import plain
from cwdpo.scoring.score import score

logger = logging.getLogger("cwdpo")
MOST_EXACT, MOST_ROUNDED = 1e-3, 0.1
"""Largest mean difference of two ways of scoring, nats per token, in fp32 and in bf16; known traps give 0.2 up."""


def autocast(model: nn.Module, bf16: bool) -> torch.autocast:
    """The precision of the training step, for everything that is compared with it.

    The Trainer casts only its own forward: a reference scored without this would differ from the policy
    before anything is learned.
    """
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


@torch.no_grad()
def check_scoring(model: nn.Module, encoder: Encoder, examples: Sequence[Example], scoring: Scoring) -> None:
    """Compare shared-prefix with plain scoring on one prompt before anything relies on it.

    Families are known by their type, and what a release of transformers does with it may change. Where the two
    differ, ``auto`` goes on in plain rows, with a line in the log.

    Raises:
        ModelError: they differ, and ``model.scoring`` is ``shared_prefix``.
    """
    if not shares_prefix(model):
        return
    found = encoder.encode_all(encoder.readable(examples, 1), "rejected", require_negative=False)[0]
    if not found:
        return  # what is wrong with the data is said where it is trained on
    batch = collate(found)
    was_training = model.training
    model.eval()
    wanted, ours = plain.score(model, batch).logp, score(model, batch).logp
    model.train(was_training)
    rounded = wanted.dtype != torch.float32 or torch.is_autocast_enabled(wanted.device.type)
    rounded = rounded or next(model.parameters()).dtype != torch.float32
    difference = float((ours - wanted).abs().mean())
    if not bool(wanted.isfinite().all()) or difference <= (MOST_ROUNDED if rounded else MOST_EXACT):
        return
    told = f"it gives other log-probabilities than plain scoring here (by {difference:.2g} nats per token)"
    if scoring == "shared_prefix":
        raise ModelError(f"model.scoring: shared_prefix is not possible: {told}; set it to auto or plain")
    logger.warning("scoring is plain, one full sequence per completion: %s", told)
    use_scoring(model, "plain")


def encode_usable(
    encoder: Encoder,
    examples: Sequence[Example],
    objective: Objective,
    negatives: Literal["gentle", "rejected"],
    max_bad_fraction: float,
) -> tuple[list[EncodedExample], list[str]]:
    """Encode examples; the second list says what was left out and why.

    Raises:
        DataError: more than ``max_bad_fraction`` of them cannot be used, or none is left.
    """
    if not examples:
        raise DataError(
            "no example is left to train on: the data has no row for this stage with "
            f"{'a negative' if objective.needs_negatives else 'a response'}; look at data.stage1_fraction and negatives"
        )
    encoded, problems = encoder.encode_all(examples, negatives, require_negative=objective.needs_negatives)
    if len(problems) > max_bad_fraction * len(examples) or not encoded:
        shown = "\n  ".join(problems[:5])
        raise DataError(
            f"{len(problems)} of {len(examples)} examples cannot be used, more than data.max_bad_fraction = "
            f"{max_bad_fraction} allows; the first:\n  {shown}\nFix the rows, or raise the fraction"
        )
    return encoded, problems


def keep_negatives(objective: Objective, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Leave out negatives that the objective filters, and prompts that lose all of theirs.

    Raises:
        DataError: nothing is left.
    """
    kept = []
    for example in examples:
        negatives = tuple(
            c
            for c in example.negatives
            if c.reference_sum_logp is None or objective.keeps(c.reference_sum_logp / len(c.ids))
        )
        if negatives or not objective.needs_negatives:
            kept.append(replace(example, negatives=negatives))
    if not kept:
        raise DataError("the negative filter leaves no pair: lower the objective's filter_below")
    return kept


def reference_mean_logps(
    reference: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    n: int,
    max_new_tokens: int,
    seed: int,
) -> list[float]:
    """mean_logp (nats per token) of ``n`` samples that the reference draws for prompts drawn by ``seed``.

    Every process must cool alike, to the last bit: the first one's values count.
    """
    order = random.Random(seed).sample(range(len(examples)), len(examples))  # files may be sorted
    repeated = [examples[order[i % len(order)]] for i in range(n)]
    samples = sample(reference, encoder, repeated, max_new_tokens=max_new_tokens, seed=seed)
    mean_logps = [round(s.mean_logp, 6) for s in samples if s.mean_logp is not None]
    return list(broadcast_object_list([mean_logps])[0])


def wants_calibration(objective: Objective) -> bool:
    """Whether floor or tau is still ``auto``."""
    return isinstance(objective, CwDpo) and objective.needs_calibration
