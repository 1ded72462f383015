"""Samples of a policy that are stored in the data, as ``cwdpo sample`` writes them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cwdpo.negatives.base import NegativeSource
from cwdpo.records import Completion, Example


class OnPolicyNegatives(NegativeSource):
    """The example's ``rejected`` of origin ``on_policy``.

    Samples of the current policy come from the rounds of stage 2 instead, see ``negatives.on_policy_fraction``.
    """

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """The example's ``rejected`` that are samples, in their order; ``pool`` and ``rng`` are not used."""
        del pool, rng
        return [c for c in example.rejected if c.origin == "on_policy"]
