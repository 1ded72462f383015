"""What a source of negatives is, and the registry that finds them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from cwdpo.records import Completion, Example
from cwdpo.registry import Component, Registry


class NegativeSource(Component, ABC):
    """Offers completions to reject for an example."""

    def prepare(self, examples: Sequence[Example]) -> None:
        """Get ready for all examples at once, before any is asked for; most sources have nothing to do."""

    @abstractmethod
    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """Negatives for ``example``, in order of preference; empty where the source has none.

        Args:
            example: the prompt, its chosen response and its references; never changed.
            pool: all examples of the same split, ``example`` included.
            rng: the only source of chance; equal state and arguments give equal negatives.

        Returns:
            Completions with ``origin``, ``kind`` and ``made`` set; their texts differ from one another.
        """


NEGATIVES: Registry[NegativeSource] = Registry(
    "negative source",
    "cwdpo.negatives.sources",
    NegativeSource,
)


def normalised(text: str) -> str:
    """``text`` in lower case without any white space: what counts as the same response."""
    return "".join(text.split()).casefold()


def known_true(example: Example) -> frozenset[str]:
    """The chosen response and the references, :func:`normalised`; no negative that we make may be one."""
    return frozenset(normalised(text) for text in (example.chosen.text, *example.references))
