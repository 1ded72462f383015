"""Answers to prompts of a user's own data: figures by hand, and a whole small study with a judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cwdpo.config import parse_recipe
from cwdpo.judging.base import JUDGES
from cwdpo.lab import answers
from cwdpo.lab.ablate import ablate
from cwdpo.lab.answers import Asked
from cwdpo.lab.cell import CellJob
from cwdpo.lab.gallery import gallery
from cwdpo.lab.grid import CellResult
from cwdpo.lab.outcome import figures_of
from cwdpo.lab.plan import Plan
from cwdpo.lab.spec import RECIPE, Decodings
from cwdpo.records import Completion, Example, Message
from cwdpo.report._study import mark
from cwdpo.worlds.shapes import ShapesSettings, materialise
from small_study import TINY, study

TEXTS = {  # by temperature and sample, for two prompts
    (0.0, 0): ["a red dog", "a cat"],
    (1.0, 0): ["a red dog", "zzz"],
    (1.0, 1): ["qqq", "a blue cat"],
    (0.5, 0): ["a red dog", "a blue cat sleeps"],
    (0.5, 1): ["a red dog", "a blue cat"],
}


def asked(**more: Any) -> Asked:
    test = [
        Example(known, (), (Message("user", "?"),), Completion(known), references=(known,))
        for known in ("a red dog", "a blue cat")
    ]
    return Asked(None, test, ("length",), **more)  # type: ignore[arg-type]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(model: Any, encoder: Any, test: Any, temperature: float, seed: int, how: Any) -> list[str]:
        return TEXTS[temperature, seed - answers.SEED]

    monkeypatch.setattr(answers, "draw", drawn)


@pytest.mark.usefixtures("written")
def test_figures_by_hand() -> None:
    """Length 3 and 2 words; a judge that gives 1 to the reference and 0 to letters that it does not have."""
    judge = JUDGES.build("references")
    found = asked(judge=judge, decodings=Decodings(temperatures=(0.5,))).figures(None)
    assert found["words"] == pytest.approx((3 + 2) / 2)
    assert found["words@0.5"] == pytest.approx((3 + 4 + 3 + 3) / 4)
    assert found["scores"] == [[1.0, 0.0], [0.0, 1.0]]
    assert found["judge_score"] == 0.5
    assert found["pictures"]["judge_score"] == [0.5, 0.5]
    assert found["greedy"] == TEXTS[0.0, 0]
    assert found["sampled"] == TEXTS[1.0, 0]
    assert found["pictures"]["greedy_score"][0] == 1.0
    assert 0 < found["pictures"]["greedy_score"][1] < 1
    assert found["judge_score@0.5"] == pytest.approx(sum(found["pictures"]["judge_score@0.5"]) / 2)
    assert "judge_score" not in asked().figures(None), "no scores without a judge"


@pytest.mark.usefixtures("written")
def test_a_metric_of_a_study_may_have_settings(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("dog, dogs\ncat\n")
    found = asked()
    for example in found.test:
        example.extra["objects"] = ["dog"]  # type: ignore[index]
    chair = replace(found, metrics=({"name": "chair", "synonyms": str(words)},)).figures(None)
    assert chair["chair_i"] == 1 / 2, "of a dog and a cat"


def test_the_columns_of_a_study_on_other_data() -> None:
    """The metrics and the judge come first, with the win rate; a probe's reading has no better direction."""
    figures = {
        "kl": 0.1, "margin": 2.0, "cider": 0.5, "better": {"cider": "higher", "judge_score": "higher"},
        "cider@0.5": 0.4, "judge_score": 0.5, "judge_score@entropy": 0.4, "temperature@entropy": 0.9,
    }  # fmt: skip
    cells = {name: [CellResult(f"{name}-seed0", "done", figures, None, 1.0)] for name in ("cw_dpo", "dpo")}
    columns = figures_of(study(), cells)
    assert [(f.label, f.better) for f in columns] == [
        ("cider", "higher"), ("cider, T=0.5", "higher"), ("judge score, T=1", "higher"),
        ("win rate vs CW-DPO", "higher"), ("judge score, same entropy", "higher"), ("KL", "none"),
        ("margin", "none"), ("temperature, same entropy", "none"),
    ]  # fmt: skip


def own_rows(tmp_path: Path, **parts: int) -> Path:
    """Rows of one's own: the world's without the scenes, in another folder than their images."""
    files = materialise(ShapesSettings(seed=3, questions=0.0, **parts), tmp_path / "world")
    own = tmp_path / "rows"
    own.mkdir()
    for part, path in files.items():
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        kept = [
            {"id": r["id"], "images": r["images"], "prompt": r["prompt"], "chosen": r["chosen"],
             "rejected": r["rejected"], "references": [r["chosen"][0]["content"][0]["text"]]}
            for r in rows
        ]  # fmt: skip
        (own / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return own


def test_the_page_shows_prompts_that_are_answered_differently(tmp_path: Path) -> None:
    own = own_rows(tmp_path, train=1, validation=1, test=3)
    recipe = parse_recipe({"data": {"path": "x.jsonl", "image_root": str(tmp_path / "world")}})
    planned = Plan()
    said = {"cw_dpo": ["same", "one", ""], "dpo": ["same", "another", ""]}
    results = {}
    for name, texts in said.items():
        key = f"{name}-seed0"
        planned.cells[key] = CellJob(key, recipe, tmp_path / key, own / "test.jsonl", "stage2")
        results[key] = CellResult(key, "done", {"greedy": texts}, None, 1.0)
    found = gallery(tmp_path, study(), planned, results, 0)
    (picture,) = found.pictures
    assert [(c.label, c.text, c.all_correct) for c in picture.captions] == [
        ("CW-DPO", "one", None),
        ("DPO", "another", None),
    ]
    assert (tmp_path / picture.image).is_file()
    assert mark(picture.captions[0]) == "", "nobody judged it"
    assert gallery(tmp_path, study(), planned, {}, 0).pictures == ()


@pytest.mark.slow
def test_a_whole_small_study_on_rows_of_ones_own(tmp_path: Path) -> None:
    """Captions with references and images in a folder that data.image_root names; a judge, temperatures, the base."""
    own = own_rows(tmp_path, train=24, validation=8, test=6)
    recipe = tmp_path / "recipe.yaml"
    data = {
        "path": str(own / "train.jsonl"), "validation_path": str(own / "validation.jsonl"),
        "image_root": str(tmp_path / "world"),
    }  # fmt: skip
    tree = yaml.safe_load(Path(RECIPE).read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump({**tree, "data": data}), encoding="utf-8")
    spec = study(
        common=[s for s in TINY if "world" not in s], judge="references", base=True,
        decodings={"temperatures": [0.7], "same_entropy": True}, score={"judge_score": 1.0},
    )  # fmt: skip
    found = ablate(recipe, spec, tmp_path / "out", seeds=2, jobs=1, test=own / "test.jsonl")
    row = found.row("dpo")
    assert [c.status for c in row.cells] == ["done", "done"], row.cells
    for key in ("cider", "cider@0.7", "cider@entropy", "judge_score", "greedy_score", "win_rate", "score"):
        assert row.figures[key].n == 2, key
    assert found.base["judge_score"].mean is not None
    assert row.against["judge_score"].two_way is not None
