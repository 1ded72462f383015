"""What every judge must hold to; a new file in the judges package is tested without being named.

A judge that has settings without a default needs a row in ``CASES``.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest

from cwdpo.judging.base import JUDGES, Judge
from cwdpo.judging.compare import verdicts
from cwdpo.records import Example
from fake_server import Fake, says, to
from reward_folder import write_reward_model

NAMES = JUDGES.names()
each = pytest.mark.parametrize("name", NAMES)


@dataclass
class Case:
    """How a judge is tried.

    ``settings``: what it needs. ``other``: by setting, a value that must change what it says or does. ``better``:
    whether the judge must find the world's chosen captions better than its rejected ones. ``done``: what it did
    besides answering (requests, forwards), appended to as it does it.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    better: bool = False
    watch: Callable[[Judge], None] = lambda judge: None
    done: list[Any] = field(default_factory=list)


def metric(tmp_path: Path, serve: Callable[..., Fake], rows: list[Example]) -> Case:
    # The default, cider, weighs words by the whole set.
    return Case({"metric": "world"}, {"metric": "length", "figure": "ill_formed"}, better=True)


def references(tmp_path: Path, serve: Callable[..., Fake], rows: list[Example]) -> Case:
    # The world's rejected captions differ in few words: they are like the references by the default threshold.
    return Case({"threshold": 0.99}, better=True)


def world(tmp_path: Path, serve: Callable[..., Fake], rows: list[Example]) -> Case:
    return Case(better=True)


def reward_model(tmp_path: Path, serve: Callable[..., Fake], rows: list[Example]) -> Case:
    one, two = (write_reward_model(tmp_path / str(seed), seed) for seed in (0, 1))
    case = Case({"path": str(one)}, {"path": str(two)})

    def watch(judge: Any) -> None:
        judge._model.model.register_forward_pre_hook(
            lambda model, args, kwargs: case.done.append(len(kwargs["input_ids"])), with_kwargs=True
        )

    case.watch = watch
    return case


def vlm(tmp_path: Path, serve: Callable[..., Fake], rows: list[Example]) -> Case:
    if importlib.util.find_spec("openai") is None:
        pytest.skip("pip install 'cwdpo[server]'")
    true = {e.chosen.text for e in rows}

    def answer(text: str) -> str:
        if "Other response: " in text:
            return "yes" if text.split("Other response: ")[1].split("\n")[0] in true else "no"
        a, b = (text.split(f"Response {x}: ")[1].split("\n")[0] in true for x in "AB")
        return "T" if a == b else "A" if a else "B"

    server = serve(says(answer))
    settings = {"server": to(server, concurrency=1).model_dump()}
    other = {
        "server": {**settings["server"], "model": "another"},
        "question": "Which one?",
        "right_question": "Is it?",
    }
    return Case(settings, other, better=True, done=server.seen)


CASES: dict[str, Callable[..., Case]] = {
    "metric": metric, "references": references, "reward_model": reward_model, "vlm": vlm, "world": world,
}  # fmt: skip


@pytest.fixture
def rows(examples: list[Example]) -> list[Example]:
    """Five captions of the world: they have scenes, references, pictures, and rejected responses."""
    return [e for e in examples if e.prompt_text.startswith("describe")][:5]


@pytest.fixture
def case(name: str, tmp_path: Path, serve: Callable[..., Fake], rows: list[Example]) -> Case:
    return CASES[name](tmp_path, serve, rows) if name in CASES else Case()


@pytest.fixture
def judge(name: str, case: Case) -> Judge:
    needed = [
        k for k, f in JUDGES.get(name).model_fields.items() if f.is_required() and k not in case.settings
    ]
    assert not needed, f"say in CASES of this file what values {needed} of judge {name} may take"
    return JUDGES.build({"name": name, **case.settings})


def near(scores: Any) -> Any:
    """Equal but for the last bits of a float32: rows of other lengths are padded otherwise."""
    return [[None if s is None else pytest.approx(s, rel=1e-4, abs=1e-6) for s in own] for own in scores]


def candidates_of(rows: list[Example]) -> list[list[str]]:
    """For each row all that it has: chosen, two rejected, and the chosen response to another picture."""
    others = [*rows[1:], rows[0]]
    return [
        [e.rejected[0].text, e.chosen.text, o.chosen.text, e.rejected[1].text]
        for e, o in zip(rows, others, strict=True)
    ]


# --- scores ---------------------------------------------------------------------------------------------


@each
def test_any_number_of_candidates(judge: Judge, rows: list[Example]) -> None:
    many = [own[:n] for own, n in zip(candidates_of(rows), (4, 0, 2, 1, 3), strict=True)]
    scores = judge.scores(rows, many)
    assert [len(own) for own in scores] == [4, 0, 2, 1, 3]
    assert all(s is None or isinstance(s, float) for own in scores for s in own)
    assert any(s is not None for own in scores for s in own)
    assert judge.scores([], []) == []
    assert judge.right([], []) == []


@each
def test_the_order_of_examples_and_of_candidates_does_not_matter(judge: Judge, rows: list[Example]) -> None:
    many = candidates_of(rows)
    scores = judge.scores(rows, many)
    assert judge.scores(rows[::-1], many[::-1]) == near(scores[::-1])
    assert judge.scores(rows, [own[::-1] for own in many]) == near([own[::-1] for own in scores])
    texts = [own[k % 4] for k, own in enumerate(many)]
    assert judge.right(rows[::-1], texts[::-1]) == judge.right(rows, texts)[::-1]


@each
def test_one_example_alone_is_judged_as_among_others(judge: Judge, rows: list[Example]) -> None:
    assert not judge.needs_whole_set, (
        "choose settings in CASES with which it can be asked about single examples"
    )
    many = candidates_of(rows)
    scores = judge.scores(rows, many)
    texts = [own[k % 4] for k, own in enumerate(many)]
    right = judge.right(rows, texts)
    for k, example in enumerate(rows):
        assert judge.scores([example], [many[k]]) == near([scores[k]])
        assert judge.right([example], [texts[k]]) == [right[k]]


@each
def test_equal_responses_have_equal_scores(judge: Judge, rows: list[Example]) -> None:
    scores = judge.scores(rows, [[own[0], own[1], own[0], own[1]] for own in candidates_of(rows)])
    assert all((a, b) == (c, d) for a, b, c, d in scores)
    assert verdicts(judge, rows, *[[e.chosen.text for e in rows]] * 2) == ["tie"] * len(rows)


@each
def test_lengths_that_do_not_agree_are_refused(judge: Judge, rows: list[Example]) -> None:
    with pytest.raises(ValueError, match="zip"):
        judge.scores(rows, candidates_of(rows)[:-1])
    with pytest.raises(ValueError, match="zip"):
        judge.right(rows[:-1], [e.chosen.text for e in rows])


# --- both uses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES])
def test_higher_is_better_in_both_uses(judge: Judge, case: Case, rows: list[Example]) -> None:
    chosen, rejected = [e.chosen.text for e in rows], [e.rejected[0].text for e in rows]
    first = judge.scores(rows, list(zip(chosen, rejected, strict=True)))
    if case.better:
        assert verdicts(judge, rows, chosen, rejected) == ["win"] * len(rows)
        assert verdicts(judge, rows, rejected, chosen) == ["loss"] * len(rows)
        assert judge.right(rows, rejected) == [False] * len(rows)
    else:  # whatever it prefers, it prefers it in both places
        turned = verdicts(judge, rows, rejected, chosen)
        assert set(turned) <= {"win", "loss"}
        assert turned == ["loss" if a > b else "win" for a, b in first]
        assert judge.right(rows, rejected) == [word == "win" for word in turned]
    assert judge.right(rows, chosen) == [True] * len(rows)


@each
def test_right_or_wrong_is_said_for_each_response(judge: Judge, rows: list[Example]) -> None:
    said = judge.right(rows, [e.rejected[1].text for e in rows])
    assert len(said) == len(rows)
    assert all(r is None or isinstance(r, bool) for r in said)


@each
def test_checking_and_estimating_judge_nothing(
    judge: Judge, case: Case, rows: list[Example], tmp_path: Path
) -> None:
    judge.check(rows)
    assert isinstance(judge.estimate(rows, candidates_of(rows), store=tmp_path / "store"), str)
    assert case.done == []
    assert not (tmp_path / "store").exists()


# --- no setting without an effect -----------------------------------------------------------------------


def values_of(annotation: Any) -> list[Any]:
    """A few values of an annotation; those out of range are refused later and left out."""
    if annotation is bool:
        return [False, True]
    if annotation is int:
        return [1, 2, 5]
    if annotation is float:
        return [-1.3, 0.0, 0.2, 0.9, 7.0]
    if annotation is type(None):
        return [None]
    if get_origin(annotation) in (Union, types.UnionType):
        return [value for part in get_args(annotation) for value in values_of(part)]
    raise AssertionError(f"say in CASES of this file what values a setting of type {annotation!r} may take")


def outcome(judge: Judge, case: Case, rows: list[Example]) -> Any:
    """Everything that a judge says about some rows and does for it."""
    case.watch(judge)
    case.done.clear()
    many = candidates_of(rows)
    said = judge.scores(rows, many), judge.right(rows, [own[k % 4] for k, own in enumerate(many)])
    return [*said, *case.done]


@pytest.mark.parametrize(("name", "setting"), [(n, s) for n in NAMES for s in JUDGES.get(n).model_fields])
def test_every_setting_is_read(
    name: str, setting: str, case: Case, judge: Judge, rows: list[Example]
) -> None:
    first = outcome(judge, case, rows)
    cls = JUDGES.get(name)
    values = (
        [case.other[setting]] if setting in case.other else values_of(cls.model_fields[setting].annotation)
    )
    for value in values:
        try:
            changed = cls(**{**case.settings, setting: value})
        except ValueError:
            continue
        if outcome(changed, case, rows) != first:
            return
    pytest.fail(f"{name}: nothing depends on {setting!r}")


@each
def test_settings_are_frozen_and_described(name: str, judge: Judge) -> None:
    text = type(judge).__doc__ or ""
    for setting, info in type(judge).model_fields.items():
        assert info.description, f"{setting}: a description for `cwdpo recipe schema`"
        assert f"{setting}:" in text, f"{setting}: a line in the docstring"
        with pytest.raises(ValueError, match="frozen"):
            setattr(judge, setting, 1)


# --- the contract finds what breaks it ------------------------------------------------------------------


class Forgetful(Judge):
    """Breaks every rule at once: it looks at places, not at texts, and no setting is read."""

    idle: int = 1

    def scores(self, examples: Any, candidates: Any, *, store: Any = None) -> list[list[float | None]]:
        return [[float(k + i) for i, _ in enumerate(own)] for k, own in enumerate(candidates)]


def test_a_judge_that_breaks_the_rules_is_found(rows: list[Example]) -> None:
    judge = Forgetful()
    for check in (
        test_the_order_of_examples_and_of_candidates_does_not_matter,
        test_one_example_alone_is_judged_as_among_others,
        test_equal_responses_have_equal_scores,
    ):
        with pytest.raises(AssertionError):
            check(judge, rows)
    case = Case()
    assert outcome(Forgetful(idle=2), case, rows) == outcome(judge, case, rows)
