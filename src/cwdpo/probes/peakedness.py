"""How peaked the policy is on held-out chosen tokens."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class Peakedness(Probe):
    """Entropy (nats), top-1 probability, and the log-probability of the argmax (nats) of the next token.

    ``argmax_logp`` is Ren & Sutherland's argmax confidence (arXiv 2407.10490): under the squeezing effect it rises
    while the likelihood of every trained or similar response falls.
    """

    readings: ClassVar[tuple[str, ...]] = ("entropy", "top1", "argmax_logp")

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``entropy``, ``top1`` and ``argmax_logp``."""
        return [
            held.reading("entropy", held.entropy, "nats/token"),
            held.reading("top1", held.top1, "probability"),
            held.reading("argmax_logp", held.top1.double().log(), "nats/token"),
        ]
