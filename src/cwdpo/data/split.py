"""Splits examples by image, so that no image is in two parts."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from cwdpo.data.contents import image_content, video_digest
from cwdpo.errors import DataError
from cwdpo.files.stored import select
from cwdpo.records import Example


def split_by_image(
    examples: Sequence[Example], fractions: Mapping[str, float], seed: int
) -> dict[str, Sequence[Example]]:
    """Split examples into named parts by their images and videos.

    They are compared by their encoded bytes, not by name. Those that occur together in an example, directly or through
    other examples, form a group; an example without any is grouped by the text of its prompt. The groups are sorted
    by blake2b(seed, content) and cut, so that each part differs from its share by at most one group. The result does
    not depend on the order of the examples; each part keeps their order. With few images, a part with a small share may
    be empty.

    Args:
        examples: the examples; their image files must be readable.
        fractions: share of the images for each part, by name; each at least 0, with a sum of 1.
        seed: another seed gives another split.

    Raises:
        DataError: the fractions are invalid, or an image cannot be read.
    """
    keys = SplitKeys.of(examples)
    return {name: select(examples, index) for name, index in keys.parts(fractions, seed).items()}


@dataclass(frozen=True)
class SplitKeys:
    """What examples are split by: their :func:`content_keys`, one after the other, and how many each example has."""

    found: bytes
    counts: Any

    @classmethod
    def of(cls, examples: Iterable[Example]) -> SplitKeys:
        """The keys of examples.

        Raises:
            DataError: an image cannot be read.
        """
        found, counts = bytearray(), array("q")
        for example in examples:
            own = content_keys(example)
            found += b"".join(own)
            counts.append(len(own))
        return cls(bytes(found), np.array(counts, dtype=np.int64))

    def select(self, index: Any) -> SplitKeys:
        """The keys of the examples at these places."""
        chosen = np.zeros(len(self.counts), dtype=bool)
        chosen[index] = True
        keys = np.frombuffer(self.found, dtype="V17")[np.repeat(chosen, self.counts)]
        return SplitKeys(keys.tobytes(), self.counts[chosen])

    def parts(self, fractions: Mapping[str, float], seed: int) -> dict[str, Any]:
        """The places of the examples of each part, in their order; see :func:`split_by_image`."""
        _check(fractions)
        shares, names = list(fractions.values()), list(fractions)
        if not len(self.counts):
            return {name: np.zeros(0, dtype=np.int64) for name in names}
        keys, group = _groups(self)
        groups = np.unique(group)
        salt = f"{seed}:".encode()
        drawn = [blake2b(salt + _named(keys[17 * i : 17 * i + 17]), digest_size=16).digest() for i in groups]
        rank = np.empty(len(keys) // 17, dtype=np.int64)
        rank[groups[np.argsort(np.array(drawn, dtype="S16"))]] = np.arange(len(groups))
        # Cut at the cumulative sum, so that rounding errors do not add up and no group is left over.
        ends = [round(math.fsum(shares[: i + 1]) * len(groups)) for i in range(len(names) - 1)] + [
            len(groups)
        ]
        part = np.searchsorted(ends, rank[group], side="right")
        return {name: np.flatnonzero(part == i) for i, name in enumerate(names)}


def _check(fractions: Mapping[str, float]) -> None:
    if not fractions or not all(math.isfinite(f) and f >= 0 for f in fractions.values()):
        raise DataError(f"split fractions {dict(fractions)}; allowed: one or more, each at least 0")
    if not math.isclose(math.fsum(fractions.values()), 1.0, abs_tol=1e-6):
        total = math.fsum(fractions.values())
        raise DataError(f"split fractions {dict(fractions)} sum to {total:g}; allowed: 1; adjust one of them")


def content_keys(example: Example) -> list[bytes]:
    """What an example is split by: a key for each image and video; of one without any, a key for its prompt's text.

    Raises:
        DataError: a file cannot be read.
    """
    return list(_keys(example)) or [_text_key(example)]


def part_of(keys: Sequence[bytes], share: float, seed: int) -> bool | None:
    """Whether an example is in the first of two parts, decided without any other example.

    Each key is in the first part if blake2b(seed, key), as a number from 0 to 1, is below ``share``. ``None`` for an
    example whose images are in both: it can be in neither without an image in two parts.

    Args:
        keys: its :func:`content_keys`.
        share: of the first part.
        seed: another seed gives another split.
    """
    salt = f"{seed}:".encode()
    drawn = {_unit(salt + _named(key)) < share for key in keys}
    return drawn.pop() if len(drawn) == 1 else None


def _unit(data: bytes) -> float:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") / 2**64


_PREFIXES = {b"i": b"image:", b"t": b"text:", b"v": b"video:"}
"""What a key is made of, by its first byte; 16 bytes of a digest follow. They have the order of their names."""


def _groups(split: SplitKeys) -> tuple[bytes, Any]:
    """All different keys of 17 bytes, in order, and for each example the number of its group's key.

    That is the smallest key of all examples connected by common images or videos.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # 'S' ignores trailing zeros, which does no harm: all keys have the same length.
    keys, number = np.unique(np.frombuffer(split.found, dtype="S17"), return_inverse=True)
    n_keys = split.counts
    first = number[np.cumsum(n_keys) - n_keys]
    edges = coo_array((np.ones(len(number)), (np.repeat(first, n_keys), number)), (len(keys), len(keys)))
    _, label = connected_components(edges, directed=False)
    _, smallest = np.unique(label, return_index=True)
    return keys.tobytes(), smallest[label][first]


def _keys(example: Example) -> Iterator[bytes]:
    for image in example.all_images:
        yield b"i" + image_content(image).digest
    for video in example.videos:
        yield b"v" + video_digest(video)


def _named(key: bytes) -> bytes:
    return _PREFIXES[key[:1]] + key[1:]


def _text_key(example: Example) -> bytes:
    said = repr([(m.role, m.parts, *([m.more] if m.more else [])) for m in example.prompt])
    return b"t" + blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
