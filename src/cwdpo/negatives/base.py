"""The interface of a source of negatives, and the registry of sources."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from cwdpo.records import Completion, Example, ImageRef
from cwdpo.registry import Component, Registry


class NegativeSource(Component, ABC):
    """Makes negatives for an example.

    A source whose negatives differ from chosen in their images and not in their text is image-side: it returns
    completions with ``images``, as many as the example has, and sets ``image_side``.
    """

    image_side: ClassVar[bool] = False

    def prepare(self, examples: Sequence[Example]) -> None:
        """Called once, with the examples that get negatives, before the first :meth:`completions`; may do nothing."""

    @abstractmethod
    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """Negatives for ``example``, best first; empty if the source has none.

        Args:
            example: the prompt, its chosen response and its references; must not be changed.
            pool: all examples of the same split, including ``example``.
            rng: the only source of randomness: the same state and arguments give the same negatives.

        Returns:
            Completions with ``origin``, ``kind`` and ``made`` set, all with different texts.
        """


NEGATIVES: Registry[NegativeSource] = Registry(
    "negative source",
    "cwdpo.negatives.sources",
    NegativeSource,
)


def normalised(text: str) -> str:
    """``text`` in lower case without white space; two responses are the same if these are equal."""
    return "".join(text.split()).casefold()


def identity(completion: Completion) -> tuple[str, tuple[ImageRef, ...] | None]:
    """What makes two negatives of an example the same: the :func:`normalised` text and the images."""
    return normalised(completion.text), completion.images


def known_true(example: Example) -> frozenset[str]:
    """The chosen response and the references, :func:`normalised`; a generated negative must be none of them."""
    return frozenset(normalised(text) for text in (example.chosen.text, *example.references))
