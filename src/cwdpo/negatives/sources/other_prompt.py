"""The chosen response of another prompt: fluent text about another image."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cwdpo.negatives.base import NegativeSource, known_true, normalised
from cwdpo.records import Completion, Example

_PROBES = 32  # random draws before the whole pool is searched; nearly always the first one is usable


class OtherPromptNegatives(NegativeSource):
    """One chosen response from the pool, drawn uniformly from those of other images."""

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """At most one negative of kind ``easy``; ``made["of"]`` is the id of the example it comes from."""
        if not pool:
            return []
        true = known_true(example)
        for _ in range(_PROBES):
            other = pool[rng.randrange(len(pool))]
            if _usable(example, other, true):
                return [_taken(other)]
        usable = [other for other in pool if _usable(example, other, true)]
        return [_taken(rng.choice(usable))] if usable else []


def _usable(example: Example, other: Example, true: frozenset[str]) -> bool:
    if other.id == example.id or normalised(other.chosen.text) in true:
        return False
    if example.pictured or other.pictured:
        return not {*example.images, *example.videos} & {*other.images, *other.videos}
    return example.prompt != other.prompt


def _taken(other: Example) -> Completion:
    return Completion(other.chosen.text, origin="dataset", kind="easy", made={"of": other.id})
