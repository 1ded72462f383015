"""Whether the policy's samples repeat themselves, or do not end."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading

GRAM = 4


class Repetition(Probe):
    """Repetition and ending of the responses that the policy sampled; no readings if no type is sampled."""

    readings: ClassVar[tuple[str, ...]] = ("repetition/", "ended/")

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``repetition/<type>`` (mean of :func:`repeated`) and ``ended/<type>`` (share that ended)."""
        readings = []
        for kind, rows in held.sampled.items():
            shares = held.entropy.new_tensor([repeated(text) for text, _ in rows])
            ended = held.entropy.new_tensor([float(end) for _, end in rows])
            readings += [
                held.reading(f"repetition/{kind}", shares, "share"),
                held.reading(f"ended/{kind}", ended, "share"),
            ]
        return readings


def repeated(text: str, n: int = GRAM) -> float:
    """seq-rep-n: share of a text's word n-grams that occur earlier in it; 0 for a text of fewer than n words.

    Source: Welleck et al., "Neural text generation with unlikelihood training" (arXiv 1908.04319).

    >>> repeated("a b c d a b c d"), repeated("a b c d e")
    (0.2, 0.0)
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
