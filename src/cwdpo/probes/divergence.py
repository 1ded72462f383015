"""How far the policy has moved from where the stage began, on held-out chosen tokens."""

from __future__ import annotations

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class Divergence(Probe):
    """Total variation, Jensen-Shannon (nats) and KL(policy || start) (nats), mean per token.

    Source of the definitions: the paper's TV / JS to the reference (arXiv 2510.11978).
    """

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``tv``, ``js``, ``kl``; nothing where the distributions were too large to keep."""
        if held.logp is None or held.start_logp is None:
            return []
        now, start = held.logp.double(), held.start_logp.double()
        p, q = now.exp(), start.exp()
        middle = ((p + q) / 2).clamp_min(1e-300).log()
        js = ((p * (now - middle)).sum(-1) + (q * (start - middle)).sum(-1)) / 2
        return [
            held.reading("tv", (p - q).abs().sum(-1) / 2, "probability"),
            held.reading("js", js, "nats/token"),
            held.reading("kl", (p * (now - start)).sum(-1), "nats/token"),
        ]
