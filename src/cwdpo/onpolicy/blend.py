"""Negatives of one round: on-policy samples and those of the mix, in the share that was asked for.

What an example gets depends on the seed, the round, its id and the samples at hand; never on batches, order or the
number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cwdpo.negatives.base import NEGATIVES, normalised
from cwdpo.negatives.mix import draw_negatives, seeded
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.samples import Sorted
from cwdpo.records import Example


@dataclass
class BlendCounts:
    """What :func:`blend` did: ``asked`` is the share asked for, counts are of negatives unless they say otherwise.

    ``short``: slots that found no negative. ``left_out``: examples without any. ``replaced_chosen``: examples
    whose chosen response is a sample now. ``dropped``: samples by the reason why they are no negatives.
    """

    asked: float
    examples: int = 0
    left_out: int = 0
    short: int = 0
    replaced_chosen: int = 0
    samples: int = 0
    by_origin: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def realised(self) -> float | None:
        """Share of on-policy negatives; ``None`` of none."""
        n = self.by_origin.total()
        return self.by_origin["on_policy"] / n if n else None

    def to_json(self) -> dict[str, Any]:
        """The counts by name, and the realised share."""
        plain = {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items()}
        return {**plain, "realised": self.realised}


def blend(
    examples: Sequence[Example],
    sampled: Mapping[str, Sorted],
    settings: NegativeSettings,
    seed: int,
    round_: int,
    *,
    need: bool = True,
) -> tuple[list[Example], BlendCounts]:
    """The examples with ``rejected`` (and, where asked for, ``chosen``) set for one round.

    Each example has K slots with a random number each. Of the slots that a sample could fill, those with the lowest
    numbers are filled by one, so many that the round's share is the asked one although some prompts have no usable
    sample. Where there are too few samples for that, slots of the other sources are left out instead, by the same
    numbers.

    Args:
        examples: with different ids, their ``rejected`` as the data has them; also the pool of the sources.
        sampled: usable samples by example id.
        settings: mix, K, fraction of this round.
        seed: with the round and an example's id, decides everything that is drawn.
        round_: the round.
        need: leave examples without a negative out.
    """
    k, fraction = settings.per_prompt or 1, settings.fraction(round_)
    counts = BlendCounts(fraction, examples=len(examples))
    for said in sampled.values():
        counts.dropped.update(said.dropped)
        counts.samples += len(said.negatives) + said.dropped.total()
    usable = {e.id: sampled.get(e.id, Sorted()).negatives for e in examples}
    wanted, kept_slots = _quotas(fraction, k, {e.id: len(usable[e.id]) for e in examples}, seed, round_)
    sources = settings.build_sources()
    sources = {name: sources.get(name) or NEGATIVES.build(name) for name in settings.mix}
    shares = {name: share for name, share in settings.mix.items() if share > 0}
    pool = sorted(examples, key=lambda e: e.id)
    for name in shares if kept_slots.total() else ():
        sources[name].prepare(pool)
    kept = []
    for example in examples:
        rng = seeded(seed, "round", round_, example.id)
        if settings.on_policy_chosen and (right := sampled.get(example.id, Sorted()).right):
            # The old one stays known as true, so that no source makes it a negative.
            references = (*example.references, example.chosen.text)
            example = replace(example, chosen=rng.choice(right), references=references)
            counts.replaced_chosen += 1
        own = rng.sample(usable[example.id], wanted[example.id])
        others = kept_slots[example.id]
        used = {normalised(c.text) for c in (*own, example.chosen)}
        found = draw_negatives(example, pool, shares, sources, others, rng.getrandbits(62), used)
        drawn = [replace(c, made={**c.made, "round": round_}) for _, c in found]
        counts.short += others - len(drawn)
        negatives = (*own, *drawn)
        if need and not negatives:
            counts.left_out += 1
            continue
        counts.by_origin.update(c.origin for c in negatives)
        kept.append(replace(example, rejected=negatives))
    return kept, counts


def _quotas(
    fraction: float, k: int, usable: Mapping[str, int], seed: int, round_: int
) -> tuple[Counter[str], Counter[str]]:
    """By example id: how many of its slots get a sample, and how many another negative."""
    able: list[tuple[float, str]] = []
    unable: list[tuple[float, str]] = []
    for id_, n in usable.items():
        rng = seeded(seed, "slots", round_, id_)
        for slot in range(k):
            (able if slot < n else unable).append((rng.random(), id_))
    able.sort()
    unable.sort()
    filled = min(round(fraction * k * len(usable)), len(able))
    enough = filled < len(able) or fraction == 0
    rest = len(unable) if enough else min(round(filled * (1 - fraction) / fraction), len(unable))
    others = Counter(id_ for _, id_ in (*able[filled:], *unable[:rest]))
    return Counter(id_ for _, id_ in able[:filled]), others
