"""SPICE, with pycocoevalcap (starts Java, and downloads Stanford's models at its first use)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cwdpo.errors import MissingPackageError
from cwdpo.metrics._coco import Tokenizer, need_java, scorer, tokenized
from cwdpo.metrics.base import Answer, Measured, Metric, mean_of


class Spice(Metric):
    """SPICE (Anderson et al., arXiv 1607.08822), times 100: F-score over scene-graph tuples.

    Args:
        tokenizer: ``simple`` or ``ptb``.
    """

    tokenizer: Tokenizer = "simple"

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``spice``: mean over prompts; a response without a score is not counted."""
        module = scorer("spice.spice", "spice")
        need_java("metric spice")
        try:
            _, scores = module.Spice().compute_score(*tokenized(answers, self.tokenizer, "spice"))
        except Exception as error:  # a failed download and a failed Java program raise different errors
            raise MissingPackageError(
                f"metric spice: its Java program or the download of Stanford's models failed ({type(error).__name__}: "
                f"{str(error)[:200]}); it downloads the models at its first use, and needs Java 8"
            ) from error
        values = [float(s["All"]["f"]) for s in scores]
        return [
            mean_of(
                "spice",
                answers,
                [None if math.isnan(v) else 100 * v for v in values],
                digits=1,
                help="SPICE x 100",
            )
        ]
