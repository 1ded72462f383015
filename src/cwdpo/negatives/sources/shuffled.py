"""The words of the chosen response in random order: a control whose text is not fluent."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cwdpo.negatives.base import NegativeSource, known_true, normalised
from cwdpo.records import Completion, Example

_TRIES = 8  # with few or repeated words, a random order may give the same text again


class ShuffledNegatives(NegativeSource):
    """One random order of the words (split at white space) of the chosen response."""

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """At most one negative of kind ``shuffled``; ``made["order"]`` holds the old index of each word."""
        del pool
        words = example.chosen.text.split()
        true = known_true(example)
        order = list(range(len(words)))
        for _ in range(_TRIES if len(words) > 1 else 0):
            rng.shuffle(order)
            text = " ".join(words[i] for i in order)
            if normalised(text) not in true:
                made = {"edit": "shuffle", "order": tuple(order)}
                return [Completion(text, origin="perturbed", kind="shuffled", made=made)]
        return []
