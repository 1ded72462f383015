"""Pairwise win rates with ties, and a bootstrap interval over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TIE = 1e-9


@dataclass(frozen=True)
class WinRate:
    """Shares of wins, ties and losses; ``rate`` counts a tie as half a win and has an interval over prompts."""

    rate: float
    low: float
    high: float
    win: float
    tie: float
    loss: float
    n_prompts: int
    n: int


def win_rate(
    scores: Sequence[Sequence[float]],
    rival: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """Compare judge scores of two policies on the same prompts.

    Args:
        scores, rival: [prompts][samples] scores; the k-th samples of a prompt are compared with each other.
        confidence: confidence level of the percentile bootstrap over prompts (scipy).
        seed: of the bootstrap.

    Raises:
        ValueError: the two do not have the same shape, or are empty.
    """
    import numpy as np
    from scipy import stats

    a, b = np.asarray(scores, dtype=float), np.asarray(rival, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(
            f"win_rate: both scores must be [prompts][samples] of the same shape, got {a.shape} and {b.shape}"
        )
    win, loss = a > b + TIE, b > a + TIE
    value = win + 0.5 * ~(win | loss)
    by_prompt = value.mean(1)
    low = high = float(by_prompt.mean())
    if len(by_prompt) > 1 and by_prompt.std() > 0:
        interval = stats.bootstrap(
            (by_prompt,), np.mean, confidence_level=confidence, n_resamples=2000, method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        low, high = float(interval.low), float(interval.high)
    tie = ~(win | loss)
    shares = (float(win.mean()), float(tie.mean()), float(loss.mean()))
    return WinRate(float(value.mean()), low, high, *shares, n_prompts=len(a), n=a.size)
