"""The chosen response under the images of another prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from cwdpo.negatives.base import NegativeSource, known_true, normalised
from cwdpo.records import Completion, Example

_PROBES = 32  # random draws before the whole pool is searched; nearly always the first one is usable


class ImageSwapNegatives(NegativeSource):
    """Chosen's text under the images of an example drawn uniformly from those for which it is not known to be true."""

    image_side: ClassVar[bool] = True

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """At most one negative of kind ``image_swap``; ``made["of"]`` is the id of the example with the images."""
        if not pool or not example.images:
            return []
        for _ in range(_PROBES):
            other = pool[rng.randrange(len(pool))]
            if _usable(example, other):
                return [_taken(example, other)]
        usable = [other for other in pool if _usable(example, other)]
        return [_taken(example, rng.choice(usable))] if usable else []


def _usable(example: Example, other: Example) -> bool:
    same_number = len(other.images) == len(example.images)
    apart = not set(example.images) & set(other.images)
    return same_number and apart and normalised(example.chosen.text) not in known_true(other)


def _taken(example: Example, other: Example) -> Completion:
    return Completion(
        example.chosen.text, origin="dataset", kind="image_swap", made={"of": other.id}, images=other.images
    )
