"""`cwdpo init` and `train --dry-run`: what they read, decide, write and refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cwdpo.config import load_recipe
from fake_hub import Hub

Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err


@pytest.fixture
def place(world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 48 rows, of which no held-out set lies beside them."""
    shutil.copytree(world_folder / "images", tmp_path / "images")
    shutil.copy(world_folder / "train.jsonl", tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


INIT = ("init", "--data", "my.jsonl", "--gpu", "4090")


@pytest.mark.slow
def test_a_recipe_is_written_that_validates_and_trains(run: Run, place: Path, model_folder: Path) -> None:
    done = run(*INIT, "--model", model_folder, "--out", "first.yaml", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["next"] == [
        "cwdpo validate first.yaml", "cwdpo train first.yaml --dry-run --gpu 4090", "cwdpo train first.yaml",
    ]  # fmt: skip
    text = (place / "first.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    for one in said["decisions"]:
        section, _, key = one["key"].rpartition(".")
        found = (tree[section] if section else tree)[key]
        assert (float(found) if isinstance(one["value"], float) else found) == one["value"]
        assert " ".join(one["why"].split()[:4]) in text.replace("\n  # ", " ")
    recipe = load_recipe("first.yaml")
    assert (recipe.name, recipe.model.path, recipe.data.path) == ("first", str(model_folder), "my.jsonl")
    assert (recipe.model.tune, recipe.model.dtype, recipe.train.gradient_checkpointing) == (
        "lora",
        "bfloat16",
        False,
    )
    assert said["rows"]["usable"] == 48
    validated = run("validate", "first.yaml")
    assert validated.code == 0, validated.out
    trained = run("train", "first.yaml", "calibration.samples=4", "evaluation.prompts=2")
    assert trained.code == 0, trained.err
    assert (place / "runs" / "first" / "model" / "adapter_config.json").is_file()
    planned = json.loads(run("plan", "first.yaml", "--gpu", "4090", "--json").out)
    assert said["memory"]["total"] == pytest.approx(planned["memory"]["total"], rel=0.03)
    steps = [int(n) for n in re.findall(r"About (\d+) steps", text)]
    assert steps == pytest.approx([stage["steps"] for stage in planned["stages"]], rel=0.25)


def test_the_embedded_model_and_a_terminal(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: str, default: str | None = None) -> str:
        asked.append(question.split(":")[0])
        return {"Model": "embedded", "Data": "my.jsonl", "GPU": "l4"}[asked[-1]]

    monkeypatch.setattr("typer.prompt", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    done = run("init")
    assert done.code == 0, done.err
    assert asked == ["Model", "Data", "GPU"]
    assert done.out.splitlines()[0].startswith(
        "data     my.jsonl: format trl, 48 usable rows, 0 bad; rejected are "
    )
    assert "24 GiB of l4" in done.out
    assert load_recipe("recipe.yaml").model.path == "embedded"


@pytest.mark.parametrize("missing", ["--model", "--data", "--gpu"])
def test_without_a_terminal_what_is_missing_is_named(run: Run, place: Path, missing: str) -> None:
    given = {"--model": "embedded", "--data": "my.jsonl", "--gpu": "4090"}
    words = [word for option, value in given.items() if option != missing for word in (option, value)]
    done = run("init", *words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"cwdpo: {missing} is missing")
    assert not (place / "recipe.yaml").exists()


def test_an_existing_file_is_not_replaced_unless_asked(run: Run, place: Path) -> None:
    (place / "recipe.yaml").write_text("mine")
    done = run(*INIT, "--model", "embedded")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("cwdpo: recipe.yaml exists")
    assert (place / "recipe.yaml").read_text() == "mine"
    assert run(*INIT, "--model", "embedded", "--yes").code == 0
    assert load_recipe("recipe.yaml").name == "recipe"


def test_rows_that_cannot_be_read_are_refused_as_validate_refuses_them(run: Run, place: Path) -> None:
    for name, content in (("empty.jsonl", ""), ("other.jsonl", '{"a": 1, "b": 2}\n')):
        (place / name).write_text(content)
        validated = run("validate", name)
        done = run("init", "--model", "embedded", "--gpu", "4090", "--data", name)
        assert (done.code, done.err) == (1, validated.err)
        assert done.err
    (place / "few.jsonl").write_text("".join((place / "my.jsonl").read_text().splitlines(keepends=True)[:7]))
    done = run("init", "--model", "embedded", "--gpu", "4090", "--data", "few.jsonl")
    assert (done.code, "few.jsonl: 7 usable rows are too few" in done.err) == (1, True)
    assert not (place / "recipe.yaml").exists()


def test_bad_rows_are_counted_and_shown(run: Run, place: Path) -> None:
    rows = (place / "my.jsonl").read_text().splitlines()
    broken = json.loads(rows[3])
    broken["images"] = ["absent.png"]
    (place / "some.jsonl").write_text("\n".join([*rows[:3], json.dumps(broken), *rows[4:]]) + "\n")
    done = run("init", "--model", "embedded", "--gpu", "4090", "--data", "some.jsonl")
    assert done.code == 0, done.err
    assert "47 usable rows, 1 bad" in done.out
    assert "absent.png" in done.out
    assert "1 of them bad: see cwdpo validate" in (place / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "./absent"), "model.path './absent': no such folder"),
        (("--model", "embedded", "--objective", "dqo"), "did you mean 'dpo'"),
        (("--model", "embedded", "--gpu", "4091"), "did you mean '4090'"),
        (("--model", "embedded", "--tune", "half"), "allowed: lora, full"),
        (("--model", "init"), "recipe show photos"),
    ],
)
def test_what_is_wrong_is_named(run: Run, place: Path, options: tuple[str, ...], message: str) -> None:
    done = run(*INIT, *options)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (place / "recipe.yaml").exists()


def test_a_hub_that_does_not_answer_is_said_at_once(
    run: Run, place: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for words in (
        (*INIT, "--model", "owner/name"),
        ("init", "--model", "embedded", "--gpu", "4090", "--data", "owner/name"),
    ):
        done = run(*words)
        assert done.code == 1
        assert (
            "'owner/name': there is no such folder here, and http://127.0.0.1:9 does not answer" in done.err
        )
        assert "name its folder" in done.err


def test_held_out_rows_beside_the_data_are_used(run: Run, world_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.yaml"
    data = world_folder / "train.jsonl"
    done = run("init", "--model", "embedded", "--gpu", "4090", "--data", data, "--out", out)
    assert done.code == 0, done.err
    recipe = load_recipe(out)
    assert recipe.data.validation_path == str(world_folder / "validation.jsonl")
    assert (recipe.probes.prompts, recipe.evaluation.prompts) == (16, 16)
    assert run("validate", out).code == 0


def test_captions_get_samples_as_negatives(run: Run, place: Path) -> None:
    rows = [json.loads(line) for line in (place / "my.jsonl").read_text().splitlines()]
    captions = [{"image": r["images"][0], "captions": [r["chosen"][0]["content"][0]["text"]]} for r in rows]
    (place / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    done = run("init", "--model", "embedded", "--gpu", "4090", "--data", "captions.jsonl")
    assert done.code == 0, done.err
    assert "no rejected responses" in done.out
    recipe = load_recipe("recipe.yaml")
    assert recipe.negatives.on_policy_fraction == 1.0
    assert recipe.stage2.objective["name"] == "cw_dpo"


# --- train --dry-run ------------------------------------------------------------------------------------


def test_a_dry_run_validates_plans_and_writes_nothing(run: Run, place: Path, model_folder: Path) -> None:
    tree = {
        "name": "dry",
        "model": {"path": str(model_folder), "device": "cpu"},
        "data": {"path": "my.jsonl"},
    }
    (place / "my.yaml").write_text(yaml.safe_dump(tree))
    before = sorted(p.name for p in place.iterdir())
    done = run("train", "my.yaml", "--dry-run", "--gpu", "4090")
    assert done.code == 0, done.err
    assert "problems: none" in done.out
    assert "it fits" in done.out
    assert done.out.index("problems: none") < done.out.index("it fits")
    small = run(
        "train", "my.yaml", "data.max_length=3", "data.max_bad_fraction=1", "--dry-run", "--gpu", "4090"
    )
    assert small.code == 1, "rows are too long"
    assert sorted(p.name for p in place.iterdir()) == before
    for words, said in (
        (("--dry-run",), "--gpu: name a GPU"),
        (("--gpu", "4090"), "it is for --dry-run"),
    ):
        refused = run("train", "my.yaml", *words)
        assert refused.code != 0
        assert said in refused.err
    assert sorted(p.name for p in place.iterdir()) == before
