"""The held-out shifts of each source in a mixture of data sets."""

from __future__ import annotations

from typing import ClassVar

from cwdpo.probes.base import HeldOut, Probe
from cwdpo.records import Reading


class Sources(Probe):
    """NLL of chosen (nats per token), chosen shift and margin (nats) of each source of ``data.sources``."""

    readings: ClassVar[tuple[str, ...]] = ("source/",)

    def __call__(self, held: HeldOut) -> list[Reading]:
        """Readings ``source/<name>/nll``, ``source/<name>/chosen_shift`` and ``source/<name>/margin``."""
        found = []
        margin = held.pair_chosen_shift - held.shift[held.negatives]
        for name in sorted(set(held.sources) - {""}):
            here = held.prompt.new_tensor([source == name for source in held.sources]).bool()[held.prompt]
            chosen = held.of("chosen") & here
            found += [
                held.reading(f"source/{name}/nll", -held.mean_logp[chosen], "nats/token"),
                held.reading(f"source/{name}/chosen_shift", held.shift[chosen], "nats"),
                held.reading(f"source/{name}/margin", margin[here[held.negatives]], "nats"),
            ]
        return found
