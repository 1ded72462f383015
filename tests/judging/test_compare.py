"""Verdicts, win rates by kind, tournaments, and Bradley-Terry strengths."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from cwdpo.errors import MissingPackageError
from cwdpo.judging.base import JUDGES
from cwdpo.judging.compare import kind_of, strengths, tournament, wins
from cwdpo.judging.win_rate import win_rate
from cwdpo.records import Completion, Example, Message
from cwdpo.worlds.shapes import make_scene


def example(number: int, **extra: Any) -> Example:
    return Example(
        str(number),
        (),
        (Message("user", ("What is it?",)),),
        Completion("a dog"),
        references=("a dog",),
        extra=extra,
    )


# --- counting -------------------------------------------------------------------------------------------


def test_wins_by_kind_by_hand() -> None:
    rows = [example(i, kind="colour" if i < 3 else "count") for i in range(5)]
    found = wins(rows, ["win", "loss", "bad", "win", "tie"])
    assert (found["all"]["win"], found["all"]["tie"], found["all"]["loss"]) == (2 / 5, 2 / 5, 1 / 5)
    assert found["all"]["rate"] == pytest.approx(3 / 5)
    assert found["all"]["bad_answers"] == 1
    assert found["colour"]["rate"] == pytest.approx(0.5)
    assert (found["colour"]["n_prompts"], found["colour"]["bad_answers"]) == (3, 1)
    assert found["count"]["rate"] == pytest.approx(0.75)
    assert set(wins(rows[:3], ["win", "tie", "loss"])) == {"all"}, "one kind needs no rows of its own"


def test_samples_of_a_prompt_are_one_prompt() -> None:
    rows = [example(i // 2) for i in range(6)]
    found = wins(rows, ["win", "loss", "win", "win", "loss", "loss"])["all"]
    theirs = win_rate([[1, 0], [1, 1], [0, 0]], [[0.5, 0.5]] * 3)
    assert (found["rate"], found["low"], found["high"], found["n_prompts"]) == (
        theirs.rate,
        theirs.low,
        theirs.high,
        3,
    )


def test_kinds_of_the_world() -> None:
    scene = example(0, scene=make_scene(1, "train", 0).to_json())
    assert kind_of(scene) == "question"
    assert kind_of(example(1, category="art")) == "art"
    assert kind_of(example(1)) == "all"


# --- Bradley-Terry --------------------------------------------------------------------------------------


def test_bradley_terry_finds_the_strengths_that_made_the_games() -> None:
    rng = np.random.default_rng(0)
    truth = {"a": 0.8, "b": 0.0, "c": -0.8}
    worth = {}
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        chance = 1 / (1 + math.exp(truth[other] - truth[one]))
        worth[one, other] = (rng.random(4000) < chance).astype(float).tolist()
    found = {row["name"]: row for row in strengths(list(truth), worth)}
    for name, value in truth.items():
        assert found[name]["value"] == pytest.approx(value, abs=0.08)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert [row["name"] for row in strengths(list(truth), worth)] == ["a", "b", "c"]


def test_bradley_terry_of_two_is_the_log_odds() -> None:
    found = {
        r["name"]: r["value"]
        for r in strengths(["a", "b"], {("a", "b"): [1.0] * 60 + [0.0] * 30 + [0.5] * 10})
    }
    assert found["a"] - found["b"] == pytest.approx(math.log(65 / 35), abs=1e-3)


def test_who_never_lost_has_a_finite_strength() -> None:
    found = strengths(["a", "b", "c"], {("a", "b"): [1.0] * 5, ("a", "c"): [1.0] * 5, ("b", "c"): [1.0] * 5})
    assert all(math.isfinite(r["value"]) for r in found)


def test_without_choix_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(MissingPackageError, match=r"Bradley-Terry .*pip install 'cwdpo\[judge\]'"):
        strengths(["a", "b"], {("a", "b"): [1.0]})


# --- all pairs of methods --------------------------------------------------------------------------------


def test_a_tournament_of_three(examples: list[Example]) -> None:
    rows = [e for e in examples if e.prompt_text.startswith("describe")][:6]
    texts = {
        "right": [e.chosen.text for e in rows],
        "mixed": [e.chosen.text if i % 2 else e.rejected[0].text for i, e in enumerate(rows)],
        "wrong": [e.rejected[0].text for e in rows],
    }
    found, strength = tournament(list(texts), JUDGES.build("world"), rows, texts)
    rates = {(r["ours"], r["theirs"]): r["rate"] for r in found}
    assert rates == {("right", "mixed"): 0.75, ("right", "wrong"): 1.0, ("mixed", "wrong"): 0.75}
    assert [s["name"] for s in strength] == ["right", "mixed", "wrong"]
