"""The best and the worst sample of a prompt by a judge's scores, against a table of scores by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cwdpo.judging.base import ScoringJudge
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.best_worst import best_and_worst
from cwdpo.onpolicy.samples import PromptSamples
from cwdpo.records import Example, Sample

SCORES = {
    "good": 0.9,
    "fair": 0.5,
    "poor": 0.1,
    "odd": None,
    "also fair": 0.5,
    "cut off": 2.0,
    "na na na na": -3.0,
}


class ByTable(ScoringJudge):
    """Scores by :data:`SCORES`."""

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float | None]:
        return [SCORES[text] for text in texts]


def samples(*texts: str) -> tuple[Sample, ...]:
    return tuple(Sample(text, ended=text != "cut off", mean_logp=-float(k)) for k, text in enumerate(texts))


CASES = {
    "three": (("fair", "poor", "good"), ("good", "poor"), {"between": 1}),
    "without a score": (("odd", "fair", "poor"), ("fair", "poor"), {"no score": 1}),
    "useless ones are extreme": (
        ("cut off", "na na na na", "fair", "good", "Good ", "", "fair"),
        ("good", "fair"),
        {"cut": 1, "degenerate": 1, "double": 2, "empty": 1},
    ),
    "all equal": (("fair", "also fair"), None, {"no worse sample": 2}),
    "one": (("fair", "odd"), None, {"no score": 1, "no worse sample": 1}),
    "none": (("odd",), None, {"no score": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_pairs_by_hand(case: str, examples: list[Example]) -> None:
    texts, wanted, dropped = CASES[case]
    example = replace(examples[0], id="a")
    drawn = {"a": PromptSamples("a", 0, 0, samples(*texts), {"temperature": 1.0})}
    pairs, counts = best_and_worst([example], drawn, ByTable(), NegativeSettings())
    assert dict(counts.dropped) == dropped
    assert (counts.examples, counts.samples, counts.left_out) == (1, len(texts), int(wanted is None))
    if wanted is None:
        assert pairs == []
        return
    (pair,) = pairs
    (rejected,) = pair.rejected
    assert (pair.chosen.text, rejected.text) == wanted
    assert (pair.prompt, pair.images, pair.references) == (example.prompt, example.images, example.references)
    assert rejected.made == {
        "temperature": 1.0,
        "score": SCORES[wanted[1]],
        "chosen_score": SCORES[wanted[0]],
        "mean_logp": -float(texts.index(wanted[1])),
    }
