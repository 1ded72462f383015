"""How far the policy has moved since the start of the stage, on chosen tokens and on sampled tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(Probe):
    """Total variation, Jensen-Shannon (nats) and KL(policy || start) (nats), mean per token.

    Source of the definitions: the paper's TV / JS to the reference (arXiv 2510.11978).
    """

    readings: ClassVar[tuple[str, ...]] = ("tv", "js", "kl", "tv/", "js/", "kl/")

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``tv``, ``js``, ``kl`` on chosen tokens, and ``kl/<type>``, ... for each sampled type.

        No readings if the distributions were too large to keep.
        """
        pairs = {f"/{kind}": pair for kind, pair in held.own.items()}
        if held.logp is not None and held.start_logp is not None:
            pairs = {"": (held.logp, held.start_logp), **pairs}
        return [reading for suffix, pair in pairs.items() for reading in self._readings(held, suffix, *pair)]

    @staticmethod
    def _readings(held: HeldOut, suffix: str, logp: Tensor, start_logp: Tensor) -> list[Reading]:
        now, start = logp.double(), start_logp.double()
        p, q = now.exp(), start.exp()
        middle = ((p + q) / 2).clamp_min(1e-300).log()
        js = ((p * (now - middle)).sum(-1) + (q * (start - middle)).sum(-1)) / 2
        return [
            held.reading(f"tv{suffix}", (p - q).abs().sum(-1) / 2, "probability"),
            held.reading(f"js{suffix}", js, "nats/token"),
            held.reading(f"kl{suffix}", (p * (now - start)).sum(-1), "nats/token"),
        ]
