"""Whether likelihood moves by length rather than by content."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe, pearson
from cwdpo.records import Reading

FEWEST = 3
"""A correlation of fewer pairs says nothing."""


class Length(Probe):
    """A sum of log-probabilities falls faster for long negatives, so their length alone can win a margin."""

    readings: ClassVar[tuple[str, ...]] = ("length/ratio", "length/correlation")

    def __call__(self, held: HeldOut) -> list[Reading]:
        """``length/ratio``: tokens of negatives over tokens of their chosen responses, mean over pairs;
        ``length/correlation``: Pearson, over pairs, of the fall of the negative (nats) with its length (tokens)."""
        negatives, chosen = held.negatives, held.of("chosen")
        if not bool(negatives.any()):
            return []
        lengths = held.n_tokens.double()
        tokens = lengths.new_zeros(int(held.prompt.max()) + 1)
        tokens[held.prompt[chosen]] = lengths[chosen]
        own = lengths[negatives]
        fall, n = -held.shift[negatives], int(negatives.sum())
        moved = n >= FEWEST and float(fall.std()) > 0 and float(own.std()) > 0
        value = pearson(fall, own) if moved else None
        return [
            held.reading("length/ratio", own / tokens[held.prompt[negatives]], "ratio"),
            Reading("length/correlation", value, n if moved else 0, "correlation", held.step),
        ]
