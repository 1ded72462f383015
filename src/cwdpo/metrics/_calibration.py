"""Expected calibration error (ECE), computed from sums over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cwdpo.metrics.base import Answer, Measured, by_prompt

if TYPE_CHECKING:
    from cwdpo.metrics.base import Numbers


def calibration(
    name: str, answers: Sequence[Answer], pairs: Sequence[Sequence[tuple[float, bool]]], bins: int
) -> Measured:
    """ECE (L1) over (confidence, correct) pairs with bins of equal width.

    ``parts`` contains, for each prompt, count, sum of confidences and sum of correct ones in each bin.

    Args:
        name: of the measured number.
        answers: one per response.
        pairs: the pairs of each answer; an answer may have any number of them.
        bins: number of bins.
    """
    rows = np.zeros((len(answers), 3 * bins))
    for i, own in enumerate(pairs):
        for confidence, correct in own:
            # As in torchmetrics: a confidence on an edge belongs to the upper bin, and 1 to the last one.
            b = min(int(np.floor(np.float32(confidence) * bins)), bins - 1)
            rows[i, b] += 1
            rows[i, bins + b] += confidence
            rows[i, 2 * bins + b] += correct
    parts, prompts = by_prompt(answers, rows.tolist() if len(answers) else [])

    def combine(totals: Numbers) -> Numbers:
        count, confidence, correct = (totals[..., k * bins : (k + 1) * bins] for k in range(3))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.abs(confidence - correct).sum(-1) / count.sum(-1))

    n = sum(map(len, pairs))
    return Measured(
        name, parts, prompts, n, combine, unit="probability", better="lower", help=f"ECE, {bins} bins"
    )
