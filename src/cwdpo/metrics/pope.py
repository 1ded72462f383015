"""POPE: whether the model says yes to objects that are not in the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cwdpo.errors import DataError
from cwdpo.metrics.base import Answer, Measured, Metric, by_prompt, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from cwdpo.metrics.base import Numbers

_YES = re.compile(r"\b(yes|yeah|yep)\b")
_NO = re.compile(r"\b(no|not|nope|isn't|aren't|doesn't|don't)\b")
# Columns of the parts.
TP, FP, TN, FN, UNREAD = range(5)


def said(text: str) -> bool | None:
    """Whether a response says yes; ``None`` if it says neither yes nor no. The first such word decides.

    >>> said("Yes, there is."), said("There is not a dog."), said("a dog")
    (True, False, None)
    """
    lower = text.lower()
    yes, no = _YES.search(lower), _NO.search(lower)
    if yes and (no is None or yes.start() < no.start()):
        return True
    return False if no else None


class Pope(Metric):
    """Yes/no questions (Li et al., arXiv 2305.10355): the right answer is the example's chosen response.

    A response that says neither is counted as the wrong answer: as "no" if yes is right, as "yes" if no is right.
    """

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``pope_accuracy``, ``pope_precision``, ``pope_recall``, ``pope_f1``, ``pope_yes_share``, ``pope_unread``."""
        rows = []
        for a in answers:
            right, given = said(a.example.chosen.text), said(a.text)
            if right is None:
                where = a.example.where or a.example.id
                raise DataError(f"{where}: chosen: a POPE answer is yes or no, got {a.example.chosen.text!r}")
            row = [0.0] * 5
            row[(TP if given else FN) if right else (TN if given is False else FP)] = 1.0
            row[UNREAD] = float(given is None)
            rows.append(row)
        parts, prompts = by_prompt(answers, rows)

        def measured(name: str, combine: Callable[[Numbers], Numbers], better: str = "higher") -> Measured:
            return Measured(f"pope_{name}", parts, prompts, len(rows), combine, unit="share", better=better)  # type: ignore[arg-type]

        def share(*top: int) -> Callable[[Numbers], Numbers]:
            return lambda t: ratio(np.stack([t[..., list(top)].sum(-1), t[..., :UNREAD].sum(-1)], -1))

        return [
            measured("accuracy", share(TP, TN)),
            measured("precision", lambda t: ratio(np.stack([t[..., TP], t[..., TP] + t[..., FP]], -1))),
            measured("recall", lambda t: ratio(np.stack([t[..., TP], t[..., TP] + t[..., FN]], -1))),
            measured(
                "f1",
                lambda t: ratio(np.stack([2 * t[..., TP], 2 * t[..., TP] + t[..., FP] + t[..., FN]], -1)),
            ),
            measured("yes_share", share(TP, FP), "none"),
            measured("unread", share(UNREAD), "lower"),
        ]
