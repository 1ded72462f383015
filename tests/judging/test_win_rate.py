"""Means, intervals and win rates, by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cwdpo.errors import DataError
from cwdpo.evaluation.intervals import mean_interval
from cwdpo.judging.win_rate import win_rate
from cwdpo.records import Completion, Example
from cwdpo.worlds.judged import judge_captions, summary
from cwdpo.worlds.shapes import Judgement

# --- means over seeds -----------------------------------------------------------------------------------


def test_mean_interval_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 4.0])
    mean = 7 / 3
    deviation = math.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2) / 2)
    half = 4.302652729911275 * deviation / math.sqrt(3)  # t table: 2 degrees of freedom, 0.975
    assert found["mean"] == pytest.approx(mean, rel=1e-12)
    assert (found["low"], found["high"]) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert found["n"] == 3
    assert found["per_seed"] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_mean_interval_against_scipy(confidence: float) -> None:
    values = np.random.default_rng(3).normal(2.0, 0.7, 9).tolist()
    found = mean_interval(values, confidence)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_mean_of_nothing_is_missing() -> None:
    assert mean_interval([]) == {"mean": None, "low": None, "high": None, "n": 0, "per_seed": []}
    assert mean_interval([None, None])["mean"] is None
    one = mean_interval([None, 3.0])
    assert (one["mean"], one["low"], one["high"], one["n"]) == (3.0, None, None, 1)
    assert one["per_seed"] == [None, 3.0]
    assert mean_interval([1.0, None, 2.0, 4.0])["mean"] == pytest.approx(7 / 3)
    assert mean_interval([0.0, 0.0])["mean"] == 0.0


def test_equal_values_have_an_interval_without_width() -> None:
    found = mean_interval([0.25, 0.25, 0.25])
    assert (found["mean"], found["low"], found["high"]) == (0.25, 0.25, 0.25)


# --- win rates ------------------------------------------------------------------------------------------


def test_win_rate_by_hand_with_ties() -> None:
    ours = [[1.0, 0.5], [0.2, 0.9], [0.7, 0.1]]
    theirs = [[0.5, 0.5], [0.2 + 1e-12, 1.0], [0.1, 0.3]]
    # win tie | tie loss | win loss
    found = win_rate(ours, theirs)
    assert (found.win, found.tie, found.loss) == (2 / 6, 2 / 6, 2 / 6)
    assert found.rate == pytest.approx((1 + 0.5 + 0.5 + 0 + 1 + 0) / 6)
    assert (found.n_prompts, found.n) == (3, 6)
    back = win_rate(theirs, ours)
    assert back.rate == pytest.approx(1 - found.rate)
    assert (back.win, back.tie, back.loss) == (found.loss, found.tie, found.win)


def test_the_interval_holds_the_rate_and_is_repeatable() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((40, 3)), rng.random((40, 3))
    found = win_rate(ours.tolist(), theirs.tolist(), seed=5)
    assert 0 <= found.low < found.rate < found.high <= 1
    assert win_rate(ours.tolist(), theirs.tolist(), seed=5) == found
    assert win_rate(ours.tolist(), theirs.tolist(), seed=6) != found
    narrow = win_rate(ours.tolist(), theirs.tolist(), seed=5, confidence=0.5)
    assert found.low < narrow.low < narrow.rate < narrow.high < found.high


def test_prompts_are_what_is_resampled_not_samples() -> None:
    """Four equal samples per prompt tell no more than one: the interval must not shrink."""
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((30, 1)), rng.random((30, 1))
    once = win_rate(ours.tolist(), theirs.tolist())
    four = win_rate(np.repeat(ours, 4, axis=1).tolist(), np.repeat(theirs, 4, axis=1).tolist())
    assert (four.low, four.high) == (once.low, once.high)
    assert (four.n, once.n) == (120, 30)


@pytest.mark.parametrize(("score", "rate"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_no_spread_no_width(score: float, rate: float) -> None:
    found = win_rate([[score]] * 5, [[0.5]] * 5)
    assert (found.rate, found.low, found.high) == (rate, rate, rate)
    alone = win_rate([[score, 1.0]], [[0.5, 0.0]])
    assert alone.low == alone.rate == alone.high


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([[1.0]], [[1.0], [1.0]]),
        ([[1.0, 2.0]], [[1.0]]),
        ([1.0, 2.0], [1.0, 2.0]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_shapes_must_agree(ours: list[list[float]], theirs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \(.*\) and \("):
        win_rate(ours, theirs)


def test_intervals_cover_the_truth() -> None:
    """200 repetitions: 40 prompts of uneven difficulty, two samples each, ties included."""
    rng = np.random.default_rng(11)
    truth = 0.5 + 0.2 / 2
    covered = 0
    for repetition in range(200):
        lean = rng.choice([0.15, 0.55, 0.8], size=(40, 1))  # chance to win, by prompt: 0.5 on average
        draw = rng.random((40, 2))
        ours = np.where(draw < lean, 1.0, np.where(draw < lean + 0.2, 0.5, 0.0))
        found = win_rate(ours.tolist(), np.full((40, 2), 0.5).tolist(), seed=repetition)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / 200 <= 0.99


# --- judged captions ------------------------------------------------------------------------------------


def test_summary_of_judgements() -> None:
    right = {"all_correct": True, "wrong": 0, "hallucinated": 0, "omitted": 0, "ill_formed": False}
    good = Judgement(score=1.0, **right)
    bad = Judgement(score=0.25, **right | {"all_correct": False, "ill_formed": True})
    assert summary([good, bad, good, good]) == {"all_correct": 0.75, "ill_formed": 0.25, "score": 0.8125}


def test_only_the_world_s_examples_can_be_judged() -> None:
    example = Example("7", (), (), Completion("a red circle"), where="data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7: scene: missing"):
        judge_captions([example], ["a red circle"])
    with pytest.raises(ValueError, match="zip"):
        judge_captions([example], [])
