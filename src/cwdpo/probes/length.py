"""Whether the change of the log-likelihood depends on the length of a response more than on its content."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe, pearson
from cwdpo.records import Reading

FEWEST = 3
"""Smallest number of pairs for a correlation."""


class Length(Probe):
    """Effects of length: the sum_logp of a long negative falls faster, so length alone can increase the margin."""

    readings: ClassVar[tuple[str, ...]] = ("length/ratio", "length/correlation")

    def __call__(self, held: HeldOut) -> list[Reading]:
        """``length/ratio``: tokens of a negative divided by tokens of its chosen response, mean over pairs;
        ``length/correlation``: Pearson correlation over pairs of the negative's -shift (nats) and length (tokens)."""
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
