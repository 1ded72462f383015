"""Where the gradient acts: residuals by response type, the share of the rejected side, the vulnerable zone.

The measures of the training step itself (norm, shares over the training pairs) are in ``trainer/gradient.py``.
"""

from __future__ import annotations

from typing import ClassVar

from cwdpo.objectives.cw_dpo import cooling_weight
from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading

VULNERABLE = (0.8, 0.99)
"""The paper's zone of a = sigmoid(beta * (chosen_shift - rejected_shift)): small loss, but large residuals."""


class Gradient(Probe):
    """The residual is ``1 - p(token)``, half the L1 norm of ``p - e`` (e: the token's one-hot vector).

    The gradient of a pair's loss in the logits of a token is ``c * (p - e)`` up to its sign, with
    ``c = beta * sigmoid(-z)`` on chosen and ``w`` times that on rejected, ``z = beta * (chosen_shift - w *
    rejected_shift)``. The rejected side's share is its part of the L1 norm of this gradient, summed over tokens and
    pairs. Source: the paper's G (arXiv 2510.11978).
    """

    readings: ClassVar[tuple[str, ...]] = (
        "gradient/residual/",
        "gradient/vulnerable",
        "gradient/rejected_share",
    )

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``gradient/residual/<type>``; if the objective has a beta also ``gradient/vulnerable`` and
        ``gradient/rejected_share``."""
        if held.sum_p is None:
            return []
        residual = 1 - held.sum_p / held.n_tokens
        readings = [
            held.reading(f"gradient/residual/{kind}", residual[held.of(kind)], "probability")
            for kind in ("chosen", *held.negative_kinds())
        ]
        beta, negatives = held.scale.beta, held.negatives
        if beta is None or not bool(negatives.any()):
            return readings
        rejected_shift = held.shift[negatives]
        a = (beta * (held.pair_chosen_shift - rejected_shift)).sigmoid()
        inside = (a >= VULNERABLE[0]) & (a <= VULNERABLE[1])
        return [
            *readings,
            held.reading("gradient/vulnerable", inside.double(), "share"),
            self._share(held, beta),
        ]

    @staticmethod
    def _share(held: HeldOut, beta: float) -> Reading:
        negatives, chosen = held.negatives, held.of("chosen")
        floor, tau = held.scale.floor, held.scale.tau
        weight = (
            held.mean_logp.new_full(held.mean_logp.shape, held.scale.weight)
            if floor is None or tau is None
            else cooling_weight(held.mean_logp, floor, tau)
        )[negatives]
        c = (-beta * (held.pair_chosen_shift - weight * held.shift[negatives])).sigmoid()
        assert held.sum_p is not None
        push = held.n_tokens - held.sum_p
        of_chosen = push.new_zeros(int(held.prompt.max()) + 1)
        of_chosen[held.prompt[chosen]] = push[chosen]
        mine, theirs = (c * weight * push[negatives]).sum(), (c * of_chosen[held.prompt[negatives]]).sum()
        share = float(mine / (mine + theirs)) if float(mine + theirs) > 0 else None
        return Reading("gradient/rejected_share", share, int(negatives.sum()), "share", held.step)
