"""Whether the policy's confidence in its next token is deserved."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15


class Calibration(Probe):
    """Token ECE: top-1 confidence against top-1 correctness on held-out chosen tokens, L1 over bins."""

    readings: ClassVar[tuple[str, ...]] = ("ece",)

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Reading ``ece``."""
        from torchmetrics.functional.classification import binary_calibration_error

        if not held.top1.numel():
            return [Reading("ece", None, 0, "probability", held.step)]
        value = binary_calibration_error(held.top1, held.correct.long(), n_bins=BINS)
        return [Reading("ece", float(value), held.top1.numel(), "probability", held.step)]


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """Rows of a reliability diagram; empty bins are left out.

    Args:
        confidence, correct: [M] top-1 probability, and 1 where top-1 was right.

    Returns:
        Per bin ``confidence`` (mean), ``accuracy`` and ``n``.
    """
    index = (confidence * bins).long().clamp(0, bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if bool(inside.any()):
            rows.append(
                {
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(correct[inside].double().mean()),
                    "n": int(inside.sum()),
                }
            )
    return rows
