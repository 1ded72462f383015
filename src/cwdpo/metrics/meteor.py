"""METEOR, with pycocoevalcap (starts Java)."""

from __future__ import annotations

from collections.abc import Sequence

from cwdpo.metrics._coco import Tokenizer, need_java, scorer, tokenized
from cwdpo.metrics.base import Answer, Measured, Metric, mean_of


class Meteor(Metric):
    """METEOR 1.5 (Denkowski & Lavie, 2014), times 100: the mean of the responses' scores.

    Args:
        tokenizer: ``simple`` or ``ptb``.
    """

    tokenizer: Tokenizer = "simple"

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``meteor``: mean over prompts."""
        module = scorer("meteor.meteor", "meteor")
        need_java("metric meteor")
        program = module.Meteor()
        try:
            _, scores = program.compute_score(*tokenized(answers, self.tokenizer, "meteor"))
        finally:
            program.meteor_p.stdout.close()
            program.meteor_p.stderr.close()
        return [mean_of("meteor", answers, [100 * float(s) for s in scores], digits=1, help="METEOR x 100")]
