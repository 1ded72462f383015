"""A reward model from a folder."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example


class RewardModel(ScoringJudge):
    """The response with the higher reward wins.

    Args:
        path: folder or hub id that ``AutoModelForSequenceClassification`` loads, with one label, and its processor.
        batch_size: responses per forward.
    """

    path: str
    batch_size: int = Field(8, gt=0)

    def scores(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """The model's one logit for prompt and response.

        Raises:
            ModelError: the folder cannot be loaded, or it has more than one label.
        """
        from cwdpo.models.reward import reward_scores

        found: list[float] = reward_scores(self.path, examples, texts, batch_size=self.batch_size)
        return found
