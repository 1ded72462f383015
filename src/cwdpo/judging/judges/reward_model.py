"""A judge that uses a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from cwdpo.judging.base import ScoringJudge
from cwdpo.records import Example


class RewardModelJudge(ScoringJudge):
    """The score is the reward of prompt and response: the only logit of a sequence classifier.

    Args:
        path: folder or hub id for ``AutoModelForSequenceClassification``, with one label, and its processor.
        batch_size: responses per forward pass.
        threshold: smallest reward of a right response; ``None``: that of the chosen response.
    """

    path: str = Field(description="folder or hub id of a sequence classifier with one label")
    batch_size: int = Field(8, gt=0, description="responses per forward pass")

    @cached_property
    def _model(self) -> Any:
        """The reward model; loaded once, because samples are judged in many calls."""
        from cwdpo.models.reward import RewardModel

        return RewardModel(self.path)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """The reward of each response.

        Raises:
            ModelError: the folder cannot be loaded, or it has more than one label.
        """
        # Score equal texts of an example only once: in another batch the last bits of a logit differ, and two equal
        # responses would not be a tie.
        rows = {(id(e), text): (e, text) for e, text in zip(examples, texts, strict=True)}
        rewards = self._model.rewards(
            [e for e, _ in rows.values()], [text for _, text in rows.values()], batch_size=self.batch_size
        )
        by_row = dict(zip(rows, rewards, strict=True))
        return [by_row[id(e), text] for e, text in zip(examples, texts, strict=True)]
