"""The token range in which a rejected response differs from the chosen one."""

from __future__ import annotations

from collections.abc import Sequence


def differing_span(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[int, int]:
    """Half-open token range of ``rejected`` outside its common prefix and suffix with ``chosen``.

    The longest common prefix is taken first, then the longest common suffix of the rest, so the two never
    overlap. If ``rejected`` is ``chosen`` with tokens deleted, this range is empty: then it is the one token
    after the deletion (or the last token). Equal sequences give ``(0, len)``.

    Args:
        chosen: token ids of the chosen response.
        rejected: token ids of the rejected response, at least one.

    Raises:
        ValueError: ``rejected`` is empty.

    >>> differing_span([5, 6, 7, 8], [5, 9, 7, 8])
    (1, 2)
    >>> differing_span([5, 6, 7, 8], [5, 8])
    (1, 2)
    """
    if not rejected:
        raise ValueError(
            "differing_span: the rejected response has no tokens; give it its end token at least"
        )
    shorter = min(len(chosen), len(rejected))
    start = 0
    while start < shorter and chosen[start] == rejected[start]:
        start += 1
    if start == len(chosen) == len(rejected):
        return 0, len(rejected)
    tail = 0
    while tail < shorter - start and chosen[-1 - tail] == rejected[-1 - tail]:
        tail += 1
    end = len(rejected) - tail
    if start < end:
        return start, end
    start = min(start, len(rejected) - 1)
    return start, start + 1
