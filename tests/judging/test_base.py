"""What derives from scores, and how recipes and commands name a judge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cwdpo.judging.judges
from cwdpo.config import parse_recipe
from cwdpo.errors import DataError, RecipeError, UnknownComponentError
from cwdpo.judging.base import JUDGES, Judge, ScoringJudge, judge_for, label_of, verdict_of
from cwdpo.judging.compare import tournament, verdicts
from cwdpo.metrics.base import METRICS, Answer
from cwdpo.onpolicy.pool import judge_rows
from cwdpo.onpolicy.samples import PromptSamples
from cwdpo.records import Completion, Example, Message, Sample

NAMES = JUDGES.names()


def example(number: int = 0, chosen: str = "a dog", **extra: Any) -> Example:
    return Example(str(number), (), (Message("user", ("What is it?",)),), Completion(chosen), extra=extra)


# --- from scores to verdicts and to right or wrong ------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (1.0, 0.0, "win"), (0.0, 1.0, "loss"), (0.5, 0.5, "tie"), (0.5, 0.5 + 1e-12, "tie"), (1e-6, 0.0, "win"),
        (None, 1.0, "bad"), (1.0, None, "bad"), (None, None, "bad"),
    ],
)  # fmt: skip
def test_a_verdict_by_scores(first: float | None, second: float | None, word: str) -> None:
    assert verdict_of(first, second) == word


class Relative(Judge):
    """Ranks candidates among themselves: the share of the others that are shorter; cannot read "odd"."""

    def scores(
        self, examples: Any, candidates: Any, *, store: Path | None = None
    ) -> list[list[float | None]]:
        return [
            [None if t == "odd" else sum(len(o) < len(t) for o in own) / len(own) for t in own]
            for own in candidates
        ]


class Words(ScoringJudge):
    """The number of words; ``None`` for "odd"."""

    def score(self, examples: Any, texts: Any) -> list[float | None]:
        return [None if t == "odd" else float(len(t.split())) for t in texts]


def test_right_is_not_worse_than_chosen_where_the_judge_says_nothing_else() -> None:
    rows, texts = [example(i) for i in range(4)], ["a large dog", "a cat", "ox", "odd"]
    for judge in (Relative(), Words()):
        assert judge.right(rows, texts) == [True, True, False, None]
        assert verdicts(judge, rows, texts, ["a dog"] * 4) == ["win", "tie", "loss", "bad"]


def test_a_threshold_takes_the_place_of_chosen() -> None:
    rows, texts = [example(i) for i in range(3)], ["a large dog", "a cat", "odd"]
    assert Words(threshold=3).right(rows, texts) == [True, False, None]
    assert Words(threshold=2).right(rows, texts) == [True, True, None]


def test_a_judge_that_loses_a_score_is_refused() -> None:
    class Short(Words):
        def score(self, examples: Any, texts: Any) -> list[float | None]:
            return super().score(examples, texts)[1:]

    with pytest.raises(ValueError, match="judge Short: 3 scores for 4 responses"):
        Short().scores([example(0), example(1)], [["a", "b"]] * 2)


# --- which judge ----------------------------------------------------------------------------------------


def test_auto_is_the_world_s_judge_where_all_data_is_the_world_s(examples: list[Example]) -> None:
    auto = {"name": "auto"}
    worldly = judge_for(auto, examples)
    assert worldly is not None
    assert label_of(worldly) == "world"
    assert judge_for(auto, [*examples, example()]) is None
    assert judge_for(auto, [example(scene=None)]) is None
    assert judge_for(auto, []) is None
    assert judge_for({"name": "none"}, examples) is None


def test_a_judge_is_refused_before_it_is_asked() -> None:
    with pytest.raises(DataError, match=r"0: scene: missing; only the embedded world has a judge"):
        judge_for({"name": "world"}, [example()])
    with pytest.raises(DataError, match=r"references: missing; the judge references .* choose another judge"):
        judge_for({"name": "references"}, [example()])


def spec_of(judge: Any) -> dict[str, Any]:
    return parse_recipe({"data": {"path": "x.jsonl"}, "negatives": {"judge": judge}}).negatives.judge


def test_a_recipe_names_a_judge_and_its_settings() -> None:
    assert parse_recipe({"data": {"path": "x.jsonl"}}).negatives.judge == {"name": "auto"}
    assert spec_of("world") == {"name": "world"}
    assert spec_of({"name": "references", "threshold": 0.7}) == {"name": "references", "threshold": 0.7}
    tree = {"data": {"path": "x.jsonl"}, "negatives": {"judge": "references"}}
    assert parse_recipe(tree, ["negatives.judge.threshold=0.3"]).negatives.judge["threshold"] == 0.3


@pytest.mark.parametrize(
    ("judge", "complaint"),
    [
        ("exact", "judge 'exact' is now called 'world'"),
        (
            {"name": "llm", "server": {"base_url": "http://x/v1", "model": "m"}},
            "judge 'llm' is now called 'vlm'",
        ),
        ("wurld", r"unknown judge 'wurld'; did you mean 'world'.*references.*auto and none"),
        ({"name": "vlm"}, "judge vlm: server: Field required"),
        ({"name": "references", "thresold": 0.5}, "unknown key 'thresold'; did you mean 'threshold'"),
        ({"name": "references", "threshold": 2}, "threshold: .*less than or equal to 1"),
        ({"name": "none", "threshold": 0.5}, "judge none takes no settings, got threshold"),
        ({"threshold": 0.5}, "'name' is missing"),
        ({"name": "metric"}, "judge metric: its scores depend on the other examples"),
        ({"name": "nowhere.py:Mine"}, "there is no file 'nowhere.py'"),
        (3, "valid dictionary"),
    ],
)
def test_a_wrong_judge_is_refused_when_the_recipe_is_read(judge: Any, complaint: str) -> None:
    with pytest.raises(RecipeError, match=rf"negatives\.judge: .*{complaint}"):
        spec_of(judge)


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"name": "auto", "threshold": 0.6, "server": None}, {"name": "auto"}),
        ({"name": "world", "threshold": 0.6, "server": None}, {"name": "world"}),
        (
            {"name": "references", "threshold": 0.7, "server": None},
            {"name": "references", "threshold": 0.7},
        ),
    ],
)
def test_recipes_that_older_runs_stored_are_read(stored: Any, now: Any) -> None:
    assert spec_of(stored) == now


# --- adding one is adding a file ------------------------------------------------------------------------

MINE = '''
"""A judge of one's own."""

from cwdpo.judging.base import ScoringJudge


class Brief(ScoringJudge):
    """Fewer words are better."""

    most: float = 100.0

    def score(self, examples, texts):
        return [max(-float(len(t.split())), -self.most) for t in texts]
'''


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that counts as part of the judges package."""
    package = cwdpo.judging.judges
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("cwdpo.judging.judges.my_brief", None)
    if hasattr(package, "my_brief"):
        del package.my_brief


@pytest.mark.parametrize("shipped", [True, False], ids=["in the package", "in a file of its own"])
def test_one_file_is_a_judge_for_both_uses(shipped: bool, dropped: Path) -> None:
    path = dropped / "my_brief.py"
    path.write_text(MINE)
    name, label = ("my_brief", "my_brief") if shipped else (f"{path}:Brief", "Brief")
    rows = [example(i, chosen="a red dog") for i in range(2)]
    # As in `cwdpo compare --judge`.
    judge = judge_for({"name": name}, rows)
    assert judge is not None
    wins, _ = tournament(["a", "b"], judge, rows, {"a": ["one", "one two"], "b": ["one two", "one two"]})
    assert [(w["judge"], w["win"], w["tie"]) for w in wins] == [(label, 0.5, 0.5)]
    # As in on-policy rounds.
    judge = judge_for(spec_of({"name": name, "most": 5}), rows)
    assert judge is not None
    drawn = [PromptSamples(e.id, 0, 0, (Sample("a dog", True), Sample("a b c d", True))) for e in rows]
    marked = judge_rows(judge, rows, drawn)
    assert [[s.right for s in row.samples] for row in marked] == [[True, False]] * 2
    with pytest.raises(RecipeError, match="unknown key 'mots'; did you mean 'most'"):
        spec_of({"name": name, "mots": 1})
    assert JUDGES.names() == sorted([*NAMES, "my_brief"])


def test_a_class_that_is_no_judge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("class Brief: pass\n")
    with pytest.raises(UnknownComponentError, match="has no class 'Brief' derived from Judge"):
        judge_for({"name": f"{path}:Brief"}, [example()])


MY_METRIC = '''
"""A metric of one's own."""

from cwdpo.metrics.base import Metric, mean_of


class Vowels(Metric):
    """Letters of ``letters`` per response."""

    letters: str = "aeiou"

    def __call__(self, answers):
        return [mean_of("vowels", answers, [float(sum(a.text.count(v) for v in self.letters)) for a in answers])]
'''


def test_a_metric_of_one_s_own_file_measures_and_judges(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MY_METRIC)
    spec = {"name": f"{path}:Vowels", "letters": "ae"}
    rows, texts = [example(i) for i in range(2)], ["a tree", "it is"]
    (number,) = METRICS.build(spec)([Answer(e, t) for e, t in zip(rows, texts, strict=True)])
    assert (number.name, number.value) == ("vowels", 1.5)
    judge = JUDGES.build({"name": "metric", "metric": spec})
    assert judge.scores(rows, [[t] for t in texts]) == [[3.0], [0.0]]
    assert judge.right(rows, texts) == [True, False], "chosen, 'a dog', has one"
    with pytest.raises(RecipeError, match="unknown key 'leters'; did you mean 'letters'"):
        METRICS.build({"name": f"{path}:Vowels", "leters": "a"})
