"""The rejected responses of the data."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cwdpo.negatives.base import NegativeSource
from cwdpo.records import Completion, Example


class DatasetNegatives(NegativeSource):
    """The example's ``rejected``, unchanged and in their order."""

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """The example's ``rejected``; ``pool`` and ``rng`` are not used."""
        del pool, rng
        return list(example.rejected)
