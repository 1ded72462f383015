"""``cwdpo ask``: the policies of a run side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cwdpo.config import parse_recipe
from cwdpo.data.encode.collate import collate
from cwdpo.errors import DataError
from cwdpo.evaluation.ask import answers, ask, asked, policies
from cwdpo.evaluation.run import model_settings
from cwdpo.models.load import load_policy
from cwdpo.models.sample import Decoding
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.scoring import plain

GREEDY = Decoding(0.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def trained(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked") / "run"
    stage = {"steps": 2, "learning_rate": 1e-3}
    recipe = parse_recipe(
        {
            "model": {
                "path": "embedded",
                "device": "cpu",
                "tune": "lora",
                "lora": {"r": 2},
                "freeze": ["vision"],
            },
            "data": {"path": str(world_folder / "train.jsonl"), "validation_fraction": 0.2},
            "stage1": {"objective": {"name": "sft"}, **stage},
            "stage2": {"objective": {"name": "dpo"}, **stage},
            "train": {"batch_size": 4},
            "evaluation": {"prompts": 0},
        }
    )
    train_two_stage(recipe, folder)
    return folder


@pytest.fixture
def picture(world_folder: Path) -> Path:
    return world_folder / "images" / "train-00000.png"


def test_each_policy_answers_as_when_loaded_alone(trained: Path, picture: Path) -> None:
    found = ask(str(trained), "describe the picture .", [picture], decodings=[GREEDY], given=["a red ring ."])
    assert list(found) == ["base", "stage 1", "final"]
    assert len({one["sum_logp"] for said in found.values() for one in said if one["how"] == "given"}) == 3
    alone = load_policy(model_settings(str(trained)))
    example = asked("describe the picture .", [picture])
    (greedy,) = answers(alone, example, [GREEDY])
    assert greedy.text == found["final"][0]["text"]


def test_likelihoods_are_those_of_plain_scoring(trained: Path, picture: Path) -> None:
    policy = load_policy(model_settings(str(trained)))
    example = asked("describe the picture .", [picture])
    greedy, given = answers(policy, example, [GREEDY], given=["a red ring ."])
    assert (greedy.how, given.how, given.text) == ("greedy", "given", "a red ring .")
    encoder = policy.encoder()
    said = type(example)(**{**vars(example), "chosen": type(example.chosen)("a red ring .")})
    encoded = encoder.encode(said, "none")
    with torch.no_grad():
        logp = plain.score(policy.model, collate([encoded])).logp[0]
    assert given.sum_logp == pytest.approx(float(logp.sum()), abs=1e-4)
    assert given.mean_logp == pytest.approx(float(logp.mean()), abs=1e-5)
    assert [t.strip() for t, _ in given.tokens][:4] == ["a", "red", "ring", "."]
    assert sum(value for _, value in given.tokens) == pytest.approx(given.sum_logp, abs=1e-4)


def test_a_model_that_is_no_run_answers_alone() -> None:
    assert list(policies("embedded")) == ["embedded"]


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        asked("What?", [tmp_path / "text.png"])
    with pytest.raises(DataError, match=r"none\.png: not an image that can be read \(FileNotFoundError"):
        asked("What?", [tmp_path / "none.png"])
    with pytest.raises(DataError, match="the question is empty"):
        asked("  ", [])


def test_the_command(run, trained: Path, picture: Path, tmp_path: Path) -> None:
    done = run("ask", trained, "describe the picture .", "--image", picture, "--samples", 1, "--tokens")
    assert done.code == 0
    assert [line for line in done.out.splitlines() if not line.startswith(" ")][:3] == [
        "base",
        "stage 1",
        "final",
    ]
    assert "temperature 1" in done.out
    done = run("ask", trained, "describe the picture .", "--image", picture, "--json")
    assert list(json.loads(done.out)) == ["base", "stage 1", "final"]
    done = run("ask", "embedded", "what <image> ?", "--image", picture)
    assert done.code == 1
    assert "the question" in done.err
