"""BLEU-4 over the whole set, with pycocoevalcap's scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cwdpo.metrics._coco import Tokenizer, scorer, tokenized
from cwdpo.metrics.base import Answer, Measured, Metric, by_prompt

if TYPE_CHECKING:
    from cwdpo.metrics.base import Numbers

_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's values against division by zero
N = 4


def corpus_bleu(totals: Numbers) -> Numbers:
    """BLEU-4 x 100 [...] from sums [..., 10]: matched and all 1- to 4-grams, length of responses and of references."""
    right, guesses = totals[..., :N], totals[..., N : 2 * N]
    precision = (right + _TINY) / (guesses + _SMALL)
    length = (totals[..., 8] + _TINY) / (totals[..., 9] + _SMALL)
    penalty = np.where(length < 1, np.exp(1 - 1 / np.maximum(length, _TINY)), 1.0)
    return np.asarray(100 * penalty * np.exp(np.log(precision).mean(-1)))


class Bleu4(Metric):
    """BLEU-4 (Papineni et al., 2002) over the whole set, closest reference length, times 100.

    Args:
        tokenizer: ``simple`` (no Java) or ``ptb`` (pycocoevalcap's own, needs Java).
    """

    tokenizer: Tokenizer = "simple"

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``bleu4``."""
        module = scorer("bleu.bleu_scorer", "bleu4")
        references, responses = tokenized(answers, self.tokenizer, "bleu4")
        rows = []
        for i in range(len(answers)):
            counts = module.cook_test(responses[i][0], module.cook_refs(references[i]))
            rows.append([*counts["correct"], *counts["guess"], counts["testlen"], _closest(counts)])
        parts, prompts = by_prompt(answers, rows or np.zeros((0, 10)).tolist())
        return [
            Measured(
                "bleu4", parts, prompts, len(answers), corpus_bleu, digits=1, help="BLEU-4 x 100, corpus"
            )
        ]


def _closest(counts: dict[str, object]) -> float:
    """The reference length nearest to the response's length; of two equally near ones the shorter."""
    lengths, own = counts["reflen"], counts["testlen"]
    assert isinstance(lengths, list)
    assert isinstance(own, int)
    return float(min((abs(length - own), length) for length in lengths)[1])
