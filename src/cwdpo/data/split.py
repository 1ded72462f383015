"""Splits that never put one picture on two sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from cwdpo.data.images import ImageDigests
from cwdpo.errors import DataError
from cwdpo.records import Example


def split_by_image(
    examples: Sequence[Example], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
    """Deal the pictures out to the named parts; every example goes where its pictures went.

    Pictures are told apart by their encoded bytes, not by name. Pictures that occur in one example together
    (also by way of others) stay together; examples without pictures go by the text of their prompt. These
    groups are sorted by blake2b(seed, content) and cut: each part is within one group of its share of the
    groups, and the result does not hang on the order of the examples, which each part keeps. A small share
    of few pictures may come out empty.

    Args:
        examples: any examples; their image files must be readable.
        fractions: shares of the pictures by the name of the part, at least 0, summing to 1.
        seed: another seed, another split.

    Raises:
        DataError: fractions that are no shares, or an image that cannot be read.
    """
    if not fractions or not all(math.isfinite(f) and f >= 0 for f in fractions.values()):
        raise DataError(f"split fractions {dict(fractions)}; allowed: one or more, each at least 0")
    if not math.isclose(math.fsum(fractions.values()), 1.0, abs_tol=1e-6):
        total = math.fsum(fractions.values())
        raise DataError(f"split fractions {dict(fractions)} sum to {total:g}; allowed: 1; adjust one of them")
    keys = _group_keys(examples)
    salt = f"{seed}:".encode()
    groups = sorted(set(keys), key=lambda key: blake2b(salt + key, digest_size=16).digest())
    part_of: dict[bytes, str] = {}
    shares, names = list(fractions.values()), list(fractions)
    start = 0
    for i, name in enumerate(names):
        # Cut by the running sum: rounding errors do not add up, and nothing is left over.
        end = len(groups) if i == len(names) - 1 else round(math.fsum(shares[: i + 1]) * len(groups))
        part_of.update(dict.fromkeys(groups[start:end], name))
        start = end
    parts: dict[str, list[Example]] = {name: [] for name in names}
    for example, key in zip(examples, keys, strict=True):
        parts[part_of[key]].append(example)
    return parts


def _group_keys(examples: Sequence[Example]) -> list[bytes]:
    """For each example the smallest key among all that are linked to it by shared pictures."""
    digests = ImageDigests()
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    firsts = []
    for example in examples:
        keys = [b"image:" + digests.of(image) for image in example.images] or [_text_key(example)]
        for key in keys:
            parent.setdefault(key, key)
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low
        firsts.append(keys[0])
    return [root(key) for key in firsts]


def _text_key(example: Example) -> bytes:
    said = repr([(message.role, message.parts) for message in example.prompt])
    return b"text:" + blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
