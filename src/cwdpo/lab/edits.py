"""``cwdpo edits``: how many captions ``perturb`` can edit, the kinds of its edits, and examples to read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError
from cwdpo.negatives.base import NEGATIVES, known_true, normalised
from cwdpo.negatives.mix import seeded
from cwdpo.negatives.sources.perturb import PerturbNegatives
from cwdpo.records import Completion, Example

MOST = 50
"""Largest number of edits made per caption."""


def read(path: Path) -> list[Example]:
    """Read captions as examples, from a data set or from a text file with one caption per line.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix != ".txt":
        return list(read_examples(path, max_bad_fraction=1.0, captions_per_image=10**6).examples)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return [Example(f"{i}", (), (), Completion(text)) for i, text in enumerate(lines)]


def table(examples: Sequence[Example], kinds: Sequence[str], show: int, seed: int = 0) -> str:
    """A markdown table: share of captions with an edit, counts by kind, and the first edit of ``show`` captions."""
    source = NEGATIVES.build({"name": "perturb", "kinds": tuple(kinds), "per_example": MOST})
    made = {e.id: source.completions(e, examples, seeded(seed, e.id)) for e in examples}
    edited = [e for e in examples if made[e.id]]
    true = sum(normalised(c.text) in known_true(e) for e in edited for c in made[e.id])
    by_kind = Counter(kind for e in edited for kind in {c.made["edit"] for c in made[e.id]})
    first = Counter(made[e.id][0].made["edit"] for e in edited)
    n, total = len(examples), sum(map(len, made.values()))
    lines = [
        f"{len(edited)} of {n} captions ({len(edited) / max(n, 1):.1%}) yield at least one edit; {total} edits in all; "
        f"{true} equal chosen or a reference.",
        "",
        "| kind | captions with such an edit | drawn first |",
        "|---|---|---|",
        *(f"| {kind} | {by_kind[kind]} | {first[kind]} |" for kind in kinds),
    ]
    drawn = random.Random(seed).sample(edited, min(show, len(edited)))
    if drawn:
        lines += ["", "| kind | caption, ~~old words~~ **new words** |", "|---|---|"]
    for e in drawn:
        how, text = made[e.id][0].made, e.chosen.text
        shown = f"{text[: how['start']]}~~{how['from']}~~ **{how['to']}**{text[how['end'] :]}"
        lines.append(f"| {how['edit']} | {shown.replace('|', '/')} |")
    return "\n".join(lines)


def describe(data: Path, captions: int, kinds: Sequence[str] | None, show: int, seed: int) -> str:
    """:func:`table` for at most ``captions`` captions of a data set, chosen at random.

    Args:
        data: the data set, or a text file.
        captions: largest number of captions.
        kinds: kinds of edits; ``None``: the default kinds of ``perturb``.
        show: number of captions to show.
        seed: of the random choices.
    """
    examples = read(data)
    drawn = random.Random(seed).sample(examples, min(captions, len(examples)))
    return table(drawn, kinds or PerturbNegatives().kinds, show, seed)
