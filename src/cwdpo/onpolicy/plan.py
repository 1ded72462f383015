"""How the steps and prompts of stage 2 are divided into rounds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cwdpo.errors import RecipeError
from cwdpo.negatives.mix import seeded


@dataclass(frozen=True)
class RoundPlan:
    """Steps and prompts of the rounds.

    Attributes:
        steps: optimizer steps of the stage.
        per_round: optimizer steps of a round; the last round may be shorter.
        batch: prompts of one optimizer step over all processes.
    """

    steps: int
    per_round: int
    batch: int

    @classmethod
    def of(cls, steps: int, rounds: int, batch: int) -> RoundPlan:
        """Divide the steps of a stage into equal rounds.

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
        """The ids of the examples that a round trains on, in order.

        All rounds together go through the ids again and again, each time in a new random order; a round is a part of
        this sequence.
        """
        first, n = round_ * self.per_round * self.batch, self.per_round * self.batch
        epochs = range(first // len(ids), (first + n - 1) // len(ids) + 1)
        order: list[str] = []
        for epoch in epochs:
            rng: random.Random = seeded(seed, "order", epoch)
            order += rng.sample(sorted(ids), len(ids))
        start = first - epochs[0] * len(ids)
        return order[start : start + n]
