"""Mixtures of data sets: how often the rows of each source are in the training data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from cwdpo.records import Example


@dataclass(frozen=True)
class Amount:
    """How much of a source is in a mixture.

    Attributes:
        repeat: how often each row is there; a fraction stands for a part of the rows.
        weight: its share, relative to the weights of the other sources; then ``repeat`` is not used.
    """

    repeat: float = 1.0
    weight: float | None = None


def sizes(counts: Mapping[str, int], amounts: Mapping[str, Amount]) -> dict[str, int]:
    """Number of rows of each source in the mixture.

    With weights the mixture has as many rows as its sources have together; rounding goes to the largest remainders.

    Args:
        counts: rows of each source.
        amounts: for each source; all with a weight, or all without.
    """
    weights = {name: amounts[name].weight for name, n in counts.items() if n}
    total = math.fsum(w for w in weights.values() if w is not None)
    if None in weights.values() or not total:
        return {name: round(n * amounts[name].repeat) for name, n in counts.items()}
    whole = sum(counts[name] for name in weights)
    exact = {name: whole * (weight or 0.0) / total for name, weight in weights.items()}
    found = {name: math.floor(size) for name, size in exact.items()}
    left = whole - sum(found.values())
    for name in sorted(exact, key=lambda n: (found[n] - exact[n], n))[:left]:
        found[name] += 1
    return {name: found.get(name, 0) for name in counts}


def mixed(examples: Sequence[Example], amounts: Mapping[str, Amount], seed: int) -> list[Example]:
    """The examples, each as often as its source asks; copies have ids of their own (``id#2``).

    Which rows are there once more, or left out, is chosen by blake2b(seed, source, id): it depends neither on the order
    of the rows nor on other sources.

    Args:
        examples: with their ``source``; their order is kept, copies follow.
        amounts: by source.
        seed: another seed chooses others.
    """
    wanted = sizes(Counter(e.source for e in examples), amounts)
    found: list[Example] = []
    for name, size in wanted.items():
        own = [e for e in examples if e.source == name]
        whole, rest = divmod(size, len(own))
        first = {e.id for e in sorted(own, key=lambda e: _place(seed, e))[:rest]}
        for copy in range(whole + (rest > 0)):
            kept = own if copy < whole else [e for e in own if e.id in first]
            found += kept if not copy else [replace(e, id=f"{e.id}#{copy + 1}") for e in kept]
    return found


def in_turn(examples: Sequence[Example]) -> list[Example]:
    """The examples with their sources in turn, so that the first few are of all sources."""
    number: Counter[str] = Counter()
    places = []
    for example in examples:
        places.append(number[example.source])
        number[example.source] += 1
    return [example for _, example in sorted(zip(places, examples, strict=True), key=lambda one: one[0])]


def _place(seed: int, example: Example) -> bytes:
    return blake2b(f"{seed}:{example.source}:{example.id}".encode(), digest_size=16).digest()
