"""Delta log p: how the log-likelihood of each response type changed since the start of the stage."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class DeltaLogp(Probe):
    """Mean change of mean_logp for each type (nats per token); and the held-out shifts and margin (nats).

    Source: Ren & Sutherland, "Learning Dynamics of LLM Finetuning" (arXiv 2407.10490).
    """

    readings: ClassVar[tuple[str, ...]] = (
        "delta_logp/",
        "chosen_shift",
        "rejected_shift",
        "margin",
        "accuracy",
        "nll",
    )

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``delta_logp/<type>``, ``chosen_shift``, ``rejected_shift``, ``margin``, ``accuracy``, ``nll``."""
        shift, chosen, negatives = held.shift, held.of("chosen"), held.negatives
        margin = held.pair_chosen_shift - shift[negatives]
        nll = -held.sum_logp[chosen].sum() / held.n_tokens[chosen].sum()
        return [
            *(
                held.reading(f"delta_logp/{kind}", (shift / held.n_tokens)[held.of(kind)], "nats/token")
                for kind in held.kind_names()
            ),
            held.reading("chosen_shift", shift[chosen], "nats"),
            held.reading("rejected_shift", shift[negatives], "nats"),
            held.reading("margin", margin, "nats"),
            held.reading("accuracy", (margin > 0).double(), "share"),
            Reading("nll", float(nll), int(held.n_tokens[chosen].sum()), "nats/token", held.step),
        ]
