"""Splits examples by image, so that no image is in two parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from cwdpo.data.contents import image_content, video_digest
from cwdpo.errors import DataError
from cwdpo.records import Example


def split_by_image(
    examples: Sequence[Example], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
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
        # Cut at the cumulative sum, so that rounding errors do not add up and no group is left over.
        end = len(groups) if i == len(names) - 1 else round(math.fsum(shares[: i + 1]) * len(groups))
        part_of.update(dict.fromkeys(groups[start:end], name))
        start = end
    parts: dict[str, list[Example]] = {name: [] for name in names}
    for example, key in zip(examples, keys, strict=True):
        parts[part_of[key]].append(example)
    return parts


def _group_keys(examples: Sequence[Example]) -> list[bytes]:
    """For each example, the key of its group: the smallest key of all examples connected by common images."""
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    firsts = []
    for example in examples:
        keys = [b"image:" + image_content(image).digest for image in example.all_images]
        keys += [b"video:" + video_digest(video) for video in example.videos]
        keys = keys or [_text_key(example)]
        for key in keys:
            parent.setdefault(key, key)
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low
        firsts.append(keys[0])
    return [root(key) for key in firsts]


def _text_key(example: Example) -> bytes:
    said = repr([(m.role, m.parts, *([m.more] if m.more else [])) for m in example.prompt])
    return b"text:" + blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
