"""How varied the responses are over the whole set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cwdpo.metrics._coco import simple_tokens
from cwdpo.metrics.base import Answer, Measured, Metric, ratio


class Diversity(Metric):
    """distinct-n (Li et al., arXiv 1510.03055): share of different n-grams; and share of different responses.

    There is no interval: a bootstrap repeats prompts and so texts, which changes the value itself.

    Args:
        n: length of the longest n-gram.
    """

    n: int = 2

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``distinct_1`` to ``distinct_n``, ``distinct_responses``: shares."""
        words = [simple_tokens(a.text).split() for a in answers]
        measured = []
        for n in range(1, self.n + 1):
            grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
            measured.append(
                _share(f"distinct_{n}", len(set(grams)), len(grams), answers, f"different {n}-grams of all")
            )
        texts = {a.text for a in answers}
        measured.append(
            _share("distinct_responses", len(texts), len(answers), answers, "different responses of all")
        )
        return measured


def _share(name: str, different: int, total: int, answers: Sequence[Answer], text: str) -> Measured:
    parts = np.array([[float(different), float(total)]])
    prompts = tuple(dict.fromkeys(a.example.id for a in answers))
    return Measured(
        name, parts, prompts, total, ratio, unit="share", better="none", help=text, resample=False
    )
