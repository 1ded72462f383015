"""Whether the policy's confidence in its next token agrees with how often that token is correct."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading

BINS = 15


class Confidence(Probe):
    """Token ECE: top-1 probability compared with top-1 correctness on held-out chosen tokens, L1 over bins."""

    readings: ClassVar[tuple[str, ...]] = ("ece",)

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Reading ``ece``."""
        from torchmetrics.functional.classification import binary_calibration_error

        if not held.top1.numel():
            return [Reading("ece", None, 0, "probability", held.step)]
        value = binary_calibration_error(held.top1, held.correct.long(), n_bins=BINS)
        return [Reading("ece", float(value), held.top1.numel(), "probability", held.step)]
