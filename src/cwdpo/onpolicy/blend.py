"""The negatives of one round: on-policy samples and negatives from the mix of sources, in the requested shares.

The negatives of an example depend on the seed, the round, its id and the usable samples. They do not depend on batches,
on the order of examples or on the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cwdpo.negatives.base import NEGATIVES, identity
from cwdpo.negatives.mix import draw_negatives, seeded
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.samples import Sorted
from cwdpo.records import Example


@dataclass
class BlendCounts:
    """Counts of what :func:`blend` did.

    Attributes:
        asked: the requested share of on-policy negatives.
        examples: examples that were given.
        left_out: examples left out because they have no negative.
        short: negatives that no source could provide.
        replaced_chosen: examples whose chosen response was replaced by a sample.
        samples: samples that were given.
        by_origin: negatives by origin.
        dropped: samples that did not become negatives, by reason.
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
        """The actual share of on-policy negatives; ``None`` if there are no negatives."""
        n = self.by_origin.total()
        return self.by_origin["on_policy"] / n if n else None

    def to_json(self) -> dict[str, Any]:
        """The counts and the actual share by name, as JSON."""
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
    """Set ``rejected`` (and, with ``on_policy_chosen``, ``chosen``) of the examples for one round.

    Each example has K slots for negatives, and each slot a random number. A slot is eligible if its prompt has a usable
    sample for it. On-policy samples are assigned to the eligible slots with the smallest random numbers until the
    requested share over all slots is reached. If there are too few samples for that, some of the other slots, chosen by
    the same random numbers, stay empty, so that the share is right over the remaining slots.

    Args:
        examples: examples with different ids and the ``rejected`` of the data; the sources also use them as the pool.
        sampled: sorted samples by example id.
        settings: the mix, K (``per_prompt``) and the share of the round.
        seed: together with the round and the example's id, decides all random choices.
        round_: number of the round.
        need: whether to leave out examples without a negative.
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
            # The old chosen response becomes a reference, so that no source makes it a negative.
            references = (*example.references, example.chosen.text)
            example = replace(example, chosen=rng.choice(right), references=references)
            counts.replaced_chosen += 1
        own = rng.sample(usable[example.id], wanted[example.id])
        others = kept_slots[example.id]
        used = {identity(c) for c in (*own, example.chosen)}
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
    """For each example id, the number of slots that get an on-policy sample, and the number that get another negative.

    See :func:`blend`.
    """
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
