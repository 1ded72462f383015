"""Means over seeds with intervals; the mean of no values is ``None``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def mean_interval(values: Sequence[float | None], confidence: float = 0.95) -> dict[str, Any]:
    """Mean over seeds with a t interval.

    Args:
        values: one value per seed; ``None`` for a seed without a value (a failed cell).
        confidence: confidence level of the interval.

    Returns:
        ``mean``, ``low``, ``high``, ``n`` and ``per_seed``; the bounds are ``None`` for fewer than two values.
    """
    import numpy as np
    from scipy import stats

    known = np.array([v for v in values if v is not None], dtype=float)
    out: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": len(known), "per_seed": list(values)}
    if len(known):
        out["mean"] = float(known.mean())
    if len(known) > 1:
        half = float(stats.t.ppf((1 + confidence) / 2, len(known) - 1) * stats.sem(known))
        out |= {"low": out["mean"] - half, "high": out["mean"] + half}
    return out
