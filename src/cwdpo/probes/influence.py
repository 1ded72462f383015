"""The predicted and the actual effect of one update on each held-out response."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class Influence(Probe):
    """Predicted and actual change of mean_logp after one small step of gradient descent; off by default.

    Source: the paper's and Ren & Sutherland's one-step decomposition, ``-eta * A * K * G``; see
    :func:`cwdpo.monitor.influence.one_step` for how it is computed and what it costs.
    """

    readings: ClassVar[tuple[str, ...]] = (
        "influence/sign",
        "influence/correlation",
        "influence/A",
        "influence/G",
        "influence/K/",
    )

    def __call__(self, held: HeldOut) -> list[Reading]:
        """``influence/sign`` (share of correctly predicted signs), ``influence/correlation`` (Pearson), the mean norms
        ``influence/A`` and ``influence/G``, and the mean effective kernel ``influence/K/<type>``."""
        found = held.one_step
        if found is None:
            return []
        n = found.predicted.numel()
        return [
            Reading("influence/sign", found.sign_agreement, n, "share", held.step),
            Reading("influence/correlation", found.correlation, n, "correlation", held.step),
            held.reading("influence/A", found.belief, "norm"),
            held.reading("influence/G", found.residual, "norm"),
            *(held.reading(f"influence/K/{k}", found.kernel_of(k), "nats") for k in sorted(set(found.kinds))),
        ]
