"""Paired differences over seeds with p-values, corrected for the number of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cwdpo.evaluation.intervals import mean_interval


def paired_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, Any]:
    """Mean of ours minus theirs over the seeds that both have, with a t interval and a two-sided p-value.

    Args:
        ours, theirs: one value per seed, in the same order; ``None`` where a cell failed.

    Returns:
        ``mean``, ``low``, ``high``, ``n`` and ``p`` (paired t test); ``p`` is ``None`` for fewer than two pairs, or if
        all differences are equal, because the test needs their variance.
    """
    from scipy import stats

    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    differences = [a - b for a, b in pairs]
    found = mean_interval(differences)
    p = None
    if len(differences) > 1 and max(differences) - min(differences) > 1e-12:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return {**{k: found[k] for k in ("mean", "low", "high", "n")}, "p": p}


def two_way_interval(
    ours: Sequence[Sequence[float] | None],
    theirs: Sequence[Sequence[float] | None],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of the mean difference that holds for other seeds and other pictures (or prompts).

    Seeds and pictures are resampled independently of each other, the same pictures in every seed (the pigeonhole
    bootstrap of Owen, 2007). It is wider than the t interval over seeds, which holds the pictures fixed.

    Args:
        ours, theirs: per seed the values of the same P pictures, [S][P]; ``None`` where a cell failed.
        confidence: of the percentile interval.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        Lower and upper bound; ``None`` where no seed has both.
    """
    import numpy as np

    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    differences = np.array([np.subtract(a, b) for a, b in pairs], dtype=float)
    rng = np.random.default_rng(seed)
    # Drawing with replacement is weighing by multinomial counts.
    weights = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in differences.shape]
    means = np.einsum("rs,sp,rp->r", weights[0], differences, weights[1], optimize=True)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: adjusted p-values that control the probability of any false positive among them.

    The k-th smallest of m p-values is multiplied by m - k + 1; the results are made non-decreasing and at most 1. A
    ``None`` is not counted and remains ``None``.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    out: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        out[i] = highest
    return out


def conclusion(difference: dict[str, Any], better: str, p: float | None) -> str:
    """The conclusion from a difference: ``better`` or ``worse`` only if the corrected p-value is below 0.05.

    Args:
        difference: with ``mean``, ours minus theirs.
        better: ``higher``, ``lower`` or ``none``: which values of the number are better.
        p: the corrected p-value.
    """
    if difference["mean"] is None:
        return "not measured"
    if p is None or p >= 0.05 or better == "none":
        return "no clear difference" if better != "none" or p is None or p >= 0.05 else "differs"
    return "better" if (difference["mean"] > 0) == (better == "higher") else "worse"
