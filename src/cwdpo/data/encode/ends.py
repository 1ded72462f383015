"""How a response ends in a rendered conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TurnEnd:
    """How a response ends.

    ``token``: id of the end token, the last token that is trained. ``tail``: text that the template writes after the
    last response. ``closing``: the part of ``tail`` that is trained, up to and with the end token; empty if the
    template does not write the end token, whose id is then appended.
    """

    token: int
    tail: str
    closing: str


def without_ends(text: str, ends: Sequence[str]) -> str:
    """The text without the end tokens that it ends with, and without white space around these."""
    while (found := next((e for e in ends if text.rstrip().endswith(e)), None)) is not None:
        text = text.rstrip().removesuffix(found).rstrip()
    return text
