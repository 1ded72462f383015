"""Mixtures of data sets: how often the rows of each source are in the training data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from cwdpo.files.stored import Stored, select
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
    found = divided(sum(counts[name] for name in weights), {n: w or 0.0 for n, w in weights.items()})
    return {name: found.get(name, 0) for name in counts}


def divided(whole: int, weights: Mapping[str, float]) -> dict[str, int]:
    """A number of rows, divided in proportion to weights; rounding goes to the largest remainders.

    Args:
        whole: the number.
        weights: at least 0, with a positive sum.
    """
    total = math.fsum(weights.values())
    exact = {name: whole * weight / total for name, weight in weights.items()}
    found = {name: math.floor(size) for name, size in exact.items()}
    left = whole - sum(found.values())
    for name in sorted(exact, key=lambda n: (found[n] - exact[n], n))[:left]:
        found[name] += 1
    return found


def mixed(examples: Sequence[Example], amounts: Mapping[str, Amount], seed: int) -> Sequence[Example]:
    """The examples, each as often as its source asks; copies have ids of their own (``id#2``).

    Which rows are there once more, or left out, is chosen by blake2b(seed, source, id): it depends neither on the order
    of the rows nor on other sources.

    Args:
        examples: with their ``source``; their order is kept, copies follow.
        amounts: by source.
        seed: another seed chooses others.
    """
    sources = [e.source for e in examples]
    wanted = sizes(Counter(sources), amounts)
    found: list[tuple[int, int]] = []
    for name, size in wanted.items():
        own = [i for i, source in enumerate(sources) if source == name]
        whole, rest = divmod(size, len(own))
        first = set(sorted(own, key=lambda i: _place(seed, examples[i]))[:rest]) if rest else set()
        for copy in range(whole + (rest > 0)):
            found += [(i, copy) for i in own if copy < whole or i in first]
    return Stored(
        replace(examples[i], id=f"{examples[i].id}#{copy + 1}") if copy else examples[i] for i, copy in found
    )


def in_turn(examples: Sequence[Example]) -> Sequence[Example]:
    """The examples with their sources in turn, so that the first few are of all sources."""
    number: Counter[str] = Counter()
    places = []
    for example in examples:
        places.append(number[example.source])
        number[example.source] += 1
    return select(examples, sorted(range(len(places)), key=places.__getitem__))


def _place(seed: int, example: Example) -> bytes:
    return blake2b(f"{seed}:{example.source}:{example.id}".encode(), digest_size=16).digest()
