"""Any metric as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cwdpo.errors import DataError
from cwdpo.judging.base import ScoringJudge
from cwdpo.metrics.base import METRICS, Answer
from cwdpo.records import Example


class Metric(ScoringJudge):
    """The response that a metric finds better wins.

    Args:
        metric: its name, or a mapping with ``name`` and settings.
        figure: which of the metric's numbers; default: its first.
    """

    metric: str | dict[str, Any] = "cider"
    figure: str | None = None

    def scores(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """The metric's number of each response, signed so that higher is better.

        Raises:
            DataError: the metric has no such number, or it does not speak about single responses.
        """
        # Numbered, because the two responses to a prompt must not be added up.
        from dataclasses import replace

        answers = [
            Answer(replace(e, id=f"{i}"), text)
            for i, (e, text) in enumerate(zip(examples, texts, strict=True))
        ]
        measured = METRICS.build(self.metric)(answers)
        found = (
            measured[0] if self.figure is None else next((m for m in measured if m.name == self.figure), None)
        )
        if found is None or len(found.parts) != len(answers):
            known = ", ".join(m.name for m in measured)
            raise DataError(f"judge metric: {self.figure!r} does not judge single responses; known: {known}")
        values = np.nan_to_num(found.combine(found.parts))
        return [float(-v if found.better == "lower" else v) for v in values]
