"""KTO's rows: a prompt, one response, and whether it is good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from cwdpo.data.formats.base import Format
from cwdpo.data.formats.trl import Trl
from cwdpo.data.pairing import pair_labelled
from cwdpo.data.read.source import RawRow
from cwdpo.data.rowparts import Row
from cwdpo.records import Example


class Kto(Format):
    """``prompt``, ``completion``, ``label`` (TRL), or ``messages`` and ``label`` (ms-swift).

    A response labelled true is chosen; all responses to the same prompt that are labelled false are its negatives. It
    is an error if all responses to a prompt have the same label, because there is no pair.
    """

    columns = ("prompt completion label", "messages label")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"image": "a.png", "prompt": "What is it?", "completion": "a cat", "label": True},
        {"image": "a.png", "prompt": "What is it?", "completion": "a dog", "label": False},
    )

    def joined(self, rows: Iterator[RawRow], notes: list[str]) -> Iterator[RawRow]:
        """Preference rows in TRL's columns, see :func:`cwdpo.data.pairing.pair_labelled`."""
        return pair_labelled(rows, notes)

    def parse(self, row: Row) -> list[Example]:
        """Parse the row like TRL's rows, since :meth:`joined` has made it one."""
        return Trl().parse(row)
