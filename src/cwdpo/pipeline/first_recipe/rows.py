"""What a data set's rows say about the recipe that fits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import median
from typing import Literal

from cwdpo.data.problems import explain_problems
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import count_rows, held_out_beside, open_source
from cwdpo.data.read.source import Source
from cwdpo.records import Example

READ = 512
"""Rows to read."""
EDIT = 0.7
"""Rejected responses that share this share of their words with chosen, in order, count as edits of it."""
COMPARED, WORDS = 128, 400
"""Responses to compare, and words of each."""

Rejected = Literal["edits", "others", "none"]


@dataclass(frozen=True)
class Rows:
    """What was found in the first rows of a data set.

    Attributes:
        path: the data set.
        format: the name of the format that it is read in.
        read, bad: rows that were read, and those of them with a problem.
        rows: usable rows of the whole set, estimated from those read; exact if all were read.
        rejected: whether rejected responses are ``edits`` of chosen, ``others`` written or sampled on their own, or
            there are ``none``.
        alike: median share of words, in order, that rejected has in common with chosen; 0 without rejected.
        problems: what is wrong with the bad rows, for the user; empty if nothing is.
        validation: the held-out set that lies beside the data, and its number of rows; ``None`` if there is none.
    """

    path: str
    format: str
    read: int
    bad: int
    rows: int
    rejected: Rejected
    alike: float
    problems: str
    validation: tuple[str, int] | None = None

    @property
    def whole(self) -> bool:
        """Whether all rows were read."""
        return self.read < READ


def look_at_rows(path: str, limit: int = READ) -> Rows:
    """Read the first rows of a data set by the reader of every run.

    Raises:
        DataError: there are no rows, no format has these columns, or none is usable: in the words of a run.
    """
    source = open_source(path)
    found = read_examples(source, max_bad_fraction=1.0, limit=limit)
    counted = count_rows(source) if len(found.examples) >= limit else None
    share = len(found.examples) / found.rows
    alike = words_in_common(found.examples)
    return Rows(
        path,
        found.format,
        found.rows,
        found.bad_rows,
        max(len(found.examples), round((counted or found.rows) * share)),
        "none" if alike is None else "edits" if alike >= EDIT else "others",
        alike or 0.0,
        explain_problems(found.problems) if found.problems else "",
        validation_beside(source),
    )


def validation_beside(source: Source) -> tuple[str, int] | None:
    """The file of held-out rows beside a file ``train``, by its name; a test set is none."""
    for own in held_out_beside(source):
        name, rows = own.files[0].name.lower(), count_rows(own)
        if len(own.files) == 1 and rows and name.startswith(("val", "dev")):
            return str(own.files[0]), rows
    return None


def words_in_common(examples: Sequence[Example]) -> float | None:
    """Median, over pairs, of the share of words that rejected and chosen have in common, in order.

    Of a pair with n and m words of which k match (``difflib``'s blocks), 2k / (n + m). Pairs that differ in their
    images only are not counted; ``None`` if there is no other.
    """
    pairs = [
        (example.chosen.text.split()[:WORDS], rejected.text.split()[:WORDS])
        for example in examples
        for rejected in example.rejected
        if rejected.images is None
    ]
    step = max(1, len(pairs) // COMPARED)
    shares = [SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs[::step]]
    return median(shares) if shares else None
