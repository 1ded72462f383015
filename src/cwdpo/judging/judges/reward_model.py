"""A reward model from a folder as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example


class RewardModelJudge(ScoringJudge):
    """The reward of prompt and response: the one logit of a sequence classifier.

    Args:
        path: folder or hub id that ``AutoModelForSequenceClassification`` loads, with one label, and its processor.
        batch_size: responses per forward.
        threshold: reward from which a response is right; ``None``: from that of the chosen response.
    """

    path: str = Field(description="folder or hub id of a sequence classifier with one label")
    batch_size: int = Field(8, gt=0, description="responses per forward")

    @cached_property
    def _model(self) -> Any:
        """Loaded once: samples are judged in many calls."""
        from cwdpo.models.reward import RewardModel

        return RewardModel(self.path)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """The reward of each response.

        Raises:
            ModelError: the folder cannot be loaded, or it has more than one label.
        """
        # Equal texts of one example share a row: in a batch of another length the last bits of a logit differ, and
        # two equal responses would no longer tie.
        rows = {(id(e), text): (e, text) for e, text in zip(examples, texts, strict=True)}
        rewards = self._model.rewards(
            [e for e, _ in rows.values()], [text for _, text in rows.values()], batch_size=self.batch_size
        )
        by_row = dict(zip(rows, rewards, strict=True))
        return [by_row[id(e), text] for e, text in zip(examples, texts, strict=True)]
