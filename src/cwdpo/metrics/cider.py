"""CIDEr, with pycocoevalcap's scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cwdpo.metrics._coco import Tokenizer, scorer, tokenized
from cwdpo.metrics.base import Answer, Measured, Metric, mean_of


class Cider(Metric):
    """CIDEr (Vedantam et al., arXiv 1411.5726), times 100 as in papers.

    Word weights come from the references of the whole set, so values on sets of different size cannot be compared. The
    bootstrap keeps the weights of the whole set.

    Args:
        tokenizer: ``simple`` (no Java) or ``ptb`` (pycocoevalcap's own, needs Java).
    """

    needs_whole_set: ClassVar[bool] = True
    tokenizer: Tokenizer = "simple"

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``cider``: mean over prompts."""
        module = scorer("cider.cider", "cider")
        if not answers:
            return [mean_of("cider", answers, [])]
        _, scores = module.Cider().compute_score(*tokenized(answers, self.tokenizer, "cider"))
        return [mean_of("cider", answers, [100 * float(s) for s in scores], digits=1, help="CIDEr x 100")]
