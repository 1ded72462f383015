"""Which negatives an example gets: from a mix of sources for stage 2, gentle ones for stage 1.

The negatives of an example depend on the seed, on its id and, for sources that use the pool, on the set of examples.
They do not depend on the order of the examples.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args, overload

from cwdpo.errors import RecipeError, nearest
from cwdpo.files.stored import Chosen, select
from cwdpo.negatives.base import NEGATIVES, NegativeSource, identity
from cwdpo.records import Completion, Example

Gentle = Literal["auto", "dataset", "perturb", "none"]

_ASKS = 4  # how often a source is called for a text that the example does not have yet


@dataclass
class MixCounts:
    """Counts of what :func:`attach_negatives` did.

    Attributes:
        examples: examples that were given.
        dropped: examples left out because they have no negative.
        short: kept examples with fewer negatives than ``per_prompt``.
        without_gentle: kept examples without a gentle negative.
        by_source, by_kind: negatives by source and by :attr:`Completion.kind`.
        gentle_by_kind: gentle negatives by their edit (or kind).
    """

    examples: int = 0
    dropped: int = 0
    short: int = 0
    without_gentle: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    gentle_by_kind: Counter[str] = field(default_factory=Counter)

    def add(self, drawn: Sequence[tuple[str, Completion]], soft: Sequence[Completion], asked: int) -> None:
        """Count an example's negatives, each with its source, and its gentle negatives; ``asked``: ``per_prompt``."""
        self.short += len(drawn) < asked
        self.by_source.update(name for name, _ in drawn)
        self.by_kind.update(completion.kind or "unnamed" for _, completion in drawn)
        self.without_gentle += not soft
        self.gentle_by_kind.update(str(g.made.get("edit") or g.kind or "unnamed") for g in soft)


def attach_negatives(
    examples: Sequence[Example],
    mix: Mapping[str, float],
    per_prompt: int | None,
    seed: int,
    gentle: str = "auto",
    *,
    sources: Mapping[str, NegativeSource] | None = None,
    first: int | None = None,
) -> tuple[Sequence[Example], MixCounts]:
    """Set ``rejected`` and ``gentle`` of the examples; returns them in the same order, with counts.

    Each of the ``per_prompt`` negatives is drawn from a source that is chosen at random by its share. If that source
    has no new text for the example, the next source of the mix is tried, in the order given, until all were tried. No
    example gets the same text twice. Examples that end up without a negative are left out and counted.

    Args:
        examples: examples of one split, with different ids; sources also use them as the pool.
        mix: share by source name; each at least 0, with a positive sum.
        per_prompt: negatives per example; ``None`` (only with ``{"dataset": 1.0}``) keeps all negatives of the data.
        seed: together with the example's id, decides all random choices.
        gentle: ``dataset`` keeps the gentle negatives of the data, ``perturb`` generates them, ``auto`` generates them
            for examples that have none, ``none`` leaves them out.
        sources: sources with settings, by their name in ``mix``. ``perturb`` also generates the gentle negatives.
            Sources that are missing here are built with their default settings.
        first: only so many examples get negatives, the first ones; the others stay as they are.

    Raises:
        RecipeError: an invalid share, ``per_prompt`` or ``gentle``.
        UnknownComponentError: a name in ``mix`` that is not a source.
    """
    shares = _checked(mix, per_prompt, gentle)
    missing = {*shares, "perturb"} - set(sources or ())
    built = {**{name: NEGATIVES.build(name) for name in missing}, **(sources or {})}
    pool = _Pool(examples)
    some: Sequence[Example] = pool if first is None or first >= len(examples) else examples[:first]
    makes_gentle = gentle == "perturb" or (gentle == "auto" and any(not e.gentle for e in some))
    for name in {**shares, **({"perturb": 1.0} if makes_gentle else {})}:
        built[name].prepare(some)
    counts = MixCounts(examples=len(examples))
    kept = Chosen(examples)
    for i, example in enumerate(examples):
        if first is not None and i >= first:
            kept.keep(i)
            continue
        if per_prompt is None:
            drawn = [("dataset", completion) for completion in example.rejected]
        else:
            drawn = draw_negatives(example, pool, shares, built, per_prompt, seed)
        if not drawn:
            counts.dropped += 1
            continue
        soft = _gentle(example, pool, built["perturb"], gentle, seed)
        counts.add(drawn, soft, per_prompt or 0)
        rejected = tuple(c for _, c in drawn)
        if (rejected, soft) == (example.rejected, example.gentle):
            kept.keep(i)
        else:
            kept.append(replace(example, rejected=rejected, gentle=soft))
    return kept.records, counts


class _Pool(Sequence[Example]):
    """The examples sorted by id; most mixes never look at them, so they are sorted when somebody does."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    @cached_property
    def _sorted(self) -> Sequence[Example]:
        ids = [e.id for e in self._examples]
        return select(self._examples, sorted(range(len(ids)), key=ids.__getitem__))

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self._sorted[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._sorted)


def _checked(mix: Mapping[str, float], per_prompt: int | None, gentle: str) -> dict[str, float]:
    for name, share in mix.items():
        if not (math.isfinite(share) and share >= 0):
            raise RecipeError(f"negatives.mix.{name}: a share must be a number, at least 0, got {share!r}")
    shares = {name: share for name, share in mix.items() if share > 0}
    if not shares:
        raise RecipeError(f"negatives.mix: give at least one source a positive share, got {dict(mix)!r}")
    if per_prompt is None and list(shares) != ["dataset"]:
        raise RecipeError(
            f"negatives.per_prompt: must be a number with the mix {dict(mix)!r}; "
            "only {'dataset': 1.0} may leave it out (and keeps all negatives)"
        )
    if per_prompt is not None and per_prompt < 1:
        raise RecipeError(f"negatives.per_prompt: must be at least 1, got {per_prompt}")
    if gentle not in get_args(Gentle):
        hint, allowed = nearest(gentle, get_args(Gentle)), ", ".join(get_args(Gentle))
        raise RecipeError(f"negatives.gentle: {gentle!r} is not known{hint}; allowed: {allowed}")
    return shares


def seeded(seed: int, *key: object) -> random.Random:
    """A random generator that depends on seed and key only."""
    text = "\0".join(map(str, (seed, *key)))
    return random.Random(hashlib.blake2b(text.encode(), digest_size=8).digest())


def draw_negatives(
    example: Example,
    pool: Sequence[Example],
    shares: Mapping[str, float],
    sources: Mapping[str, NegativeSource],
    per_prompt: int,
    seed: int,
    taken: Collection[Hashable] = (),
) -> list[tuple[str, Completion]]:
    """Draw up to ``per_prompt`` negatives for an example, each with the name of its source.

    Args:
        taken: :func:`identity` of completions that must not be drawn.

    For the other arguments see :func:`attach_negatives`.
    """
    names = list(shares)
    choose = seeded(seed, example.id)
    used: set[Hashable] = set(taken)
    drawn: list[tuple[str, Completion]] = []
    for draw in range(per_prompt):
        start = names.index(choose.choices(names, list(shares.values()))[0])
        for name in names[start:] + names[:start]:
            found = _new(sources[name], example, pool, used, seed, f"{name} {draw}")
            if found is not None:
                used.add(identity(found))
                if found not in example.rejected:
                    found = replace(found, made={**found.made, "source": name, "seed": seed, "draw": draw})
                drawn.append((name, found))
                break
    return drawn


def _new(
    source: NegativeSource,
    example: Example,
    pool: Sequence[Example],
    used: set[Hashable],
    seed: int,
    key: str,
) -> Completion | None:
    """One completion of ``source`` that is not in ``used``, or ``None``."""
    for ask in range(_ASKS):
        rng = seeded(seed, example.id, key, ask)
        offered = source.completions(example, pool, rng)
        fresh = [c for c in offered if identity(c) not in used]
        if fresh:
            return rng.choice(fresh)
        if not offered:
            return None
    return None


def _gentle(
    example: Example, pool: Sequence[Example], perturb: NegativeSource, gentle: str, seed: int
) -> tuple[Completion, ...]:
    if gentle == "none":
        return ()
    if gentle == "dataset" or (gentle == "auto" and example.gentle):
        return example.gentle
    made = perturb.completions(example, pool, seeded(seed, example.id, "gentle"))
    return tuple(replace(c, made={**c.made, "source": "perturb", "seed": seed}) for c in made)
