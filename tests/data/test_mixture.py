"""Mixtures: how often each row is there, by hand; a run on two data sets in two formats."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.config import parse_recipe
from cwdpo.data.mixture import Amount, in_turn, mixed, sizes
from cwdpo.errors import DataError, RecipeError
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.records import Completion, Example, Message
from cwdpo.report.model_card import model_card
from cwdpo.rundir import RunDir
from cwdpo.stage.splits import prepare_data

Run = Callable[..., Any]


def examples(**counts: int) -> list[Example]:
    return [
        Example(f"{name}/{i}", (), (Message("user", (f"{name} {i}",)),), Completion("yes"), source=name)
        for name, n in counts.items()
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("counts", "amounts", "wanted"),
    [
        ({"a": 30, "b": 10}, {"a": Amount(), "b": Amount(3.0)}, {"a": 30, "b": 30}),
        ({"a": 30, "b": 10}, {"a": Amount(0.5), "b": Amount(1.5)}, {"a": 15, "b": 15}),
        ({"a": 30, "b": 10}, {"a": Amount(weight=1), "b": Amount(weight=1)}, {"a": 20, "b": 20}),
        ({"a": 30, "b": 10}, {"a": Amount(weight=3), "b": Amount(weight=1)}, {"a": 30, "b": 10}),
        # 10 rows, thirds: 3 1/3 each; the first by name gets the row that is left.
        ({"a": 4, "b": 4, "c": 2}, dict.fromkeys("abc", Amount(weight=1)), {"a": 4, "b": 3, "c": 3}),
        # A source without rows in this stage leaves its share to the others.
        (
            {"a": 4, "b": 0, "c": 4},
            {"a": Amount(weight=1), "b": Amount(weight=1), "c": Amount(weight=3)},
            {"a": 2, "b": 0, "c": 6},
        ),
    ],
)
def test_sizes_by_hand(counts: dict[str, int], amounts: dict[str, Amount], wanted: dict[str, int]) -> None:
    assert sizes(counts, amounts) == wanted


def test_rows_are_there_as_often_as_asked() -> None:
    rows = examples(a=10, b=4)
    found = mixed(rows, {"a": Amount(0.3), "b": Amount(2.5)}, seed=0)
    times = Counter(e.id.partition("#")[0] for e in found)
    assert sorted(n for i, n in times.items() if i[0] == "a") == [1, 1, 1]
    assert sorted(n for i, n in times.items() if i[0] == "b") == [2, 2, 3, 3]
    assert len({e.id for e in found}) == len(found)
    assert all(e.prompt == next(r for r in rows if r.id == e.id.partition("#")[0]).prompt for e in found)
    again = mixed(rows[::-1], {"a": Amount(0.3), "b": Amount(2.5)}, seed=0)
    assert {e.id for e in again} == {e.id for e in found}
    assert {e.id for e in mixed(rows, {"a": Amount(0.3), "b": Amount(2.5)}, 1)} != {e.id for e in found}
    assert mixed(rows, dict.fromkeys("ab", Amount()), 0) == rows


def test_sources_take_turns() -> None:
    assert [e.id for e in in_turn(examples(a=3, b=1))] == ["a/0", "b/0", "a/1", "a/2"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "x", "sources": [{"path": "y"}]}, "exactly one of 'path', 'sources' and 'world'"),
        ({"sources": [{"path": "p/x.jsonl"}, {"path": "q/x.jsonl"}]}, "two are called 'x'"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "'b' has no 'weight'"),
        ({"sources": [{"path": "a", "weight": 1, "repeat": 2}]}, "'a' has 'weight' and 'repeat'"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"path": "a", "name": "a/b"}]}, "name"),
        ({"sources": [{"path": "a", "weigth": 1}]}, "weight"),
    ],
)
def test_mixtures_that_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"data": data})


@pytest.fixture(scope="module")
def recipe_tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of 24 rows of TRL's format and 8 of LLaMA-Factory's, with the same ids, by weight."""
    folder = tmp_path_factory.mktemp("mixture")

    def write(name: str, n: int, row: Callable[[int], dict[str, Any]]) -> str:
        (folder / name).mkdir()
        for i in range(n):
            noise = random.Random(f"{name} {i} mixed").randbytes(
                48 * 48
            )  # the same in every run: images decide the split
            Image.frombytes("L", (48, 48), noise).convert("RGB").save(folder / name / f"{i}.png")
        lines = (json.dumps({"id": str(i), "images": [f"{i}.png"], **row(i)}) + "\n" for i in range(n))
        (folder / name / "rows.jsonl").write_text("".join(lines))
        return str(folder / name / "rows.jsonl")

    pairs = write("pairs", 24, lambda i: {"prompt": "What?", "chosen": "a circle", "rejected": "a square"})
    turns = write("turns", 8, lambda i: {
        "conversations": [{"from": "human", "value": f"<image>Which? {i}"}],
        "chosen": {"from": "gpt", "value": "a red one"}, "rejected": {"from": "gpt", "value": "a blue one"},
    })  # fmt: skip
    return {
        "name": "mixture",
        "model": {"path": "embedded", "device": "cpu"},
        "data": {
            "sources": [
                {"path": pairs, "name": "pairs", "weight": 1},
                {"path": turns, "name": "turns", "weight": 1},
            ],
            "validation_fraction": 0.25, "stage1_fraction": 0.5,
        },
        "stage1": {"objective": "sft", "learning_rate": 1e-4, "steps": 1},
        "stage2": {"objective": {"name": "cw_dpo", "floor": -3.0, "tau": 1.0}, "learning_rate": 1e-4, "steps": 3},
        "train": {"batch_size": 4, "logging_steps": 1},
        "probes": {"every": 3, "prompts": 6},
        "evaluation": {"prompts": 0},
    }  # fmt: skip


def test_a_run_counts_and_measures_each_source(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    run = train_two_stage(parse_recipe(recipe_tree), tmp_path / "run")
    rows = [r for r in run.metrics() if r["stage"] == "stage2" and "loss" in r]
    for row in rows:
        shares = [row.get(f"source/{name}/share", 0.0) for name in ("pairs", "turns")]
        assert sum(shares) == pytest.approx(1)
    both = next(r for r in rows if 0 < r.get("source/turns/share", 0.0) < 1)
    n = {name: 4 * both[f"source/{name}/share"] for name in ("pairs", "turns")}
    for value in ("logps_mean/rejected", "rewards/margins", "cooling/weight"):
        overall = both.get(value, both.get(f"{value}_mean"))
        assert sum(n[s] * both[f"source/{s}/{value}"] for s in n) / 4 == pytest.approx(overall, rel=1e-5)
    last = {r["name"]: r for r in run.readings() if r["stage"] == "stage2" and r["step"] == 3}
    for name in ("margin", "chosen_shift"):
        parts = [last[f"source/{s}/{name}"] for s in n]
        assert sum(p["n"] for p in parts) == last[name]["n"] == 6
        assert sum(p["value"] * p["n"] for p in parts) / 6 == pytest.approx(last[name]["value"], rel=1e-6)
    note = next(r["note"] for r in run.rows("notes.jsonl") if r["note"].startswith("stage2"))
    assert note == "stage2: 12 rows of 2 sources: pairs 6 (50%), turns 6 (50%)"
    page = (run.path / "report.html").read_text()
    assert "mixture of pairs, turns" in page
    assert "Margin by source, held out" in page


def test_the_card_names_the_sets_of_the_hub(tmp_path: Path) -> None:
    sources = [{"path": "openbmb/RLAIF-V-Dataset"}, {"path": "/home/me/mine.jsonl"}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"data": {"sources": sources}}))
    card = model_card(tmp_path, "full")
    assert "datasets:\n- openbmb/RLAIF-V-Dataset\n" in card
    assert "/home/me" not in card


def test_no_image_is_in_two_parts_and_ids_differ(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    splits = prepare_data(parse_recipe(recipe_tree), RunDir(tmp_path))
    parts = [splits.stage1, splits.stage2, splits.validation]
    pictures = [{i.path for e in part for i in e.images} for part in parts]
    assert len(pictures[0] | pictures[1] | pictures[2]) == sum(map(len, pictures))
    assert all(len({e.id for e in part}) == len(part) for part in parts)
    assert {e.source for e in splits.validation[:2]} == {"pairs", "turns"}


def test_validate_shows_each_source(recipe_tree: dict[str, Any], tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_tree))
    done = run("validate", path, "--show", 1)
    assert done.code == 0, done.out + done.err
    assert "format trl" in done.out
    assert "format llamafactory" in done.out
    assert "Which? 0" in done.out
    assert run("validate", path, "--fix", tmp_path / "fixed.jsonl").code == 2


def test_a_stop_rule_names_a_source_that_is_there(recipe_tree: dict[str, Any]) -> None:
    parse_recipe({**recipe_tree, "stop": ["source/turns/margin < 0"]})
    with pytest.raises(RecipeError, match=r"no source is called 'tunrs'; data.sources has pairs, turns"):
        parse_recipe({**recipe_tree, "stop": ["source/tunrs/margin < 0"]})
    with pytest.raises(RecipeError, match=r"no source is called 'turns'; there are no data.sources"):
        parse_recipe({"data": {"path": "x"}, "stop": ["source/turns/margin < 0"]})


def test_a_mixture_of_no_row_is_named(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    sources = [{"path": s["path"], "repeat": 0.001} for s in recipe_tree["data"]["sources"]]
    sources = [{**s, "name": f"n{i}"} for i, s in enumerate(sources)]
    tree = {**recipe_tree, "data": {**recipe_tree["data"], "sources": sources}}
    with pytest.raises(DataError, match=r"data\.sources: repeat leaves no row of 24 to train on"):
        prepare_data(parse_recipe(tree), RunDir(tmp_path))


def test_a_dry_run_validates_each_source(recipe_tree: dict[str, Any], tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_tree))
    done = run("train", path, "--dry-run", "--gpu", "4090")
    assert done.code == 0, done.out + done.err
    assert "format trl" in done.out
    assert "format llamafactory" in done.out


def test_pairs_of_a_file_take_the_place_of_a_mixture(
    recipe_tree: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_tree))
    pairs = recipe_tree["data"]["sources"][0]["path"]
    done = run("train", path, "--from", pairs, "--dry-run", "--gpu", "4090")
    assert done.code == 0, done.out + done.err
    assert "format llamafactory" not in done.out
