"""A judge that uses a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from cwdpo.errors import DataError, UnknownComponentError
from cwdpo.judging.base import ScoringJudge
from cwdpo.metrics.base import METRICS, Answer
from cwdpo.records import Example


class MetricJudge(ScoringJudge):
    """The score is a metric's number for the response, with its sign changed if lower is better.

    Args:
        metric: the metric's name, ``file.py:Class``, or a mapping with ``name`` and settings.
        figure: which of the metric's numbers to use; ``None``: the first.
        threshold: smallest score of a right response; ``None``: the score of the chosen response.
    """

    metric: str | dict[str, Any] = Field("cider", description="name or {name: ..., setting: ...} of a metric")
    figure: str | None = Field(None, description="which of the metric's numbers to use; null: the first")

    @field_validator("metric")
    @classmethod
    def _reads_texts(cls, spec: str | dict[str, Any]) -> str | dict[str, Any]:
        try:
            metric = METRICS.build(spec)
        except UnknownComponentError as error:
            raise ValueError(str(error)) from None
        if metric.needs - {"text"}:
            raise ValueError(
                f"it needs {', '.join(sorted(metric.needs - {'text'}))} of the model, but a judge gets texts only: "
                "name a metric that uses the text of a response"
            )
        return spec

    @property
    def needs_whole_set(self) -> bool:
        """Whether the metric needs the whole set."""
        return METRICS.build(self.metric).needs_whole_set

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """The metric's number for each response.

        Raises:
            DataError: the metric has no such number, or has none for a single response.
        """
        # Each response gets its own id, because a metric adds up the responses to one prompt.
        answers = [
            Answer(replace(e, id=f"{i}"), text)
            for i, (e, text) in enumerate(zip(examples, texts, strict=True))
        ]
        measured = METRICS.build(self.metric)(answers)
        number = next((m for m in measured if self.figure in (None, m.name)), None)
        if number is None or len(number.parts) != len(answers):
            known = ", ".join(m.name for m in measured)
            raise DataError(f"judge metric: {self.figure!r} cannot score single responses; known: {known}")
        # A number that is 0 / 0 for a response, for example if it names no object, becomes 0.
        values = np.nan_to_num(number.combine(number.parts))
        return [float(-v if number.better == "lower" else v) for v in values]
