"""Lengths of examples, in words, or in tokens of a checkpoint's processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.template import CheckpointTokens
from cwdpo.records import Example

_KEPT_EXAMPLES = 256  # an encoder keeps its results; it is replaced after so many examples to save memory


@dataclass(frozen=True)
class Lengths:
    """Words or tokens of one example; tokens include expanded images and the end-of-turn token."""

    prompt: int
    chosen: int
    negatives: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Prompt plus longest response, which ``data.max_length`` limits."""
        return self.prompt + max(self.chosen, *self.negatives, 0)


@dataclass(frozen=True)
class LengthCounter:
    """Counts in ``unit``; ``of`` raises :class:`cwdpo.errors.DataError` for what cannot be encoded."""

    unit: Literal["words", "tokens"]
    of: Callable[[Example], Lengths]


def word_counter() -> LengthCounter:
    """Counts words (separated by white space)."""

    def of(example: Example) -> Lengths:
        said = sum(len(part.split()) for turn in example.prompt for part in turn.texts)
        chosen, *negatives = (
            len(c.text.split()) for c in (example.chosen, *example.rejected, *example.gentle)
        )
        return Lengths(said, chosen, tuple(negatives))

    return LengthCounter("words", of)


def token_counter(processor: Any, checkpoint: CheckpointTokens | None = None) -> LengthCounter:
    """Counts tokens exactly as in training; every image and video is decoded and processed.

    Raises:
        ModelError: the checkpoint has no token that ends a response.
    """
    encoder = Encoder(processor, cache_gb=0, checkpoint=checkpoint)
    assert encoder.end_ids
    counted = 0

    def of(example: Example) -> Lengths:
        nonlocal counted
        counted += 1
        if counted % _KEPT_EXAMPLES == 0:
            encoder.forget()
        sides = {"rejected": example.rejected, "gentle": example.gentle}
        said = [(f"{side}[{k}]", c.text) for side, kept in sides.items() for k, c in enumerate(kept)]
        encoder.template.check_texts(example, [("chosen", example.chosen.text), *said])
        responses = (example.chosen, *example.rejected, *example.gentle)
        chosen, *negatives = (len(encoder.completion_ids(example, c.text)) for c in responses)
        found = Lengths(len(encoder.prompt(example).input_ids), chosen, tuple(negatives))
        encoder.check_positions(example, found.longest)
        return found

    return LengthCounter("tokens", of)
