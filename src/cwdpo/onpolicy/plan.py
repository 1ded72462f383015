"""Which prompts belong to which round."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cwdpo.errors import RecipeError
from cwdpo.negatives.mix import seeded


@dataclass(frozen=True)
class RoundPlan:
    """Steps and prompts by round.

    ``steps``: optimizer steps of the stage; ``per_round``: of every round but the last, which may be shorter;
    ``batch``: prompts of one optimizer step over all processes.
    """

    steps: int
    per_round: int
    batch: int

    @classmethod
    def of(cls, steps: int, rounds: int, batch: int) -> RoundPlan:
        """The steps of a stage in equal rounds.

        Raises:
            RecipeError: a round would have no step.
        """
        per_round = math.ceil(steps / rounds)
        if (rounds - 1) * per_round >= steps:
            raise RecipeError(
                f"negatives.rounds: {rounds} rounds of {per_round} steps do not fit into {steps} steps of stage 2; "
                "take fewer rounds or more steps"
            )
        return cls(steps, per_round, batch)

    def prompts(self, ids: Sequence[str], round_: int, seed: int) -> list[str]:
        """The ids that a round trains on: a stretch of an endless, reshuffled list of all ids."""
        first, n = round_ * self.per_round * self.batch, self.per_round * self.batch
        epochs = range(first // len(ids), (first + n - 1) // len(ids) + 1)
        order: list[str] = []
        for epoch in epochs:
            rng: random.Random = seeded(seed, "order", epoch)
            order += rng.sample(sorted(ids), len(ids))
        start = first - epochs[0] * len(ids)
        return order[start : start + n]
