"""How peaked the policy is on held-out chosen tokens."""

from __future__ import annotations

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class Peakedness(Probe):
    """Entropy (nats) and top-1 probability of the next-token distribution."""

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``entropy`` and ``top1``."""
        return [
            held.reading("entropy", held.entropy, "nats/token"),
            held.reading("top1", held.top1, "probability"),
        ]
