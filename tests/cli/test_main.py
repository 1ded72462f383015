"""The command line: help, exit codes, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from cwdpo.cli import main as cli
from cwdpo.config import Recipe
from cwdpo.errors import NonFiniteError

Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


# --- help -----------------------------------------------------------------------------------------------


def test_the_commands_are_there() -> None:
    assert {("demo",), ("train",), ("validate",), ("report",), ("init-model",), ("recipe", "schema")} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_every_command(run: Run, path: tuple[str, ...]) -> None:
    done = run(*path, "--help")
    assert done.code == 0
    assert done.err == ""
    text = " ".join(done.out.split())
    assert text.startswith("Usage: ")
    assert " ".join(path) in text.partition(" [")[0]
    assert COMMANDS[path].help.split(".")[0].split(";")[0] in text
    for parameter in COMMANDS[path].params:
        for option in getattr(parameter, "opts", ()):
            assert option.lower() in text.lower(), f"{option} is missing from the help"


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    done = run()
    assert done.code == 2
    text = done.out + done.err
    for first, *_ in COMMANDS:
        assert first in text


@pytest.mark.parametrize(
    "arguments", [("trian",), ("train",), ("init-model", "x", "--width", "wide"), ("validate", "x", "--jsn")]
)
def test_wrong_usage_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.err.startswith("Usage: ")
    assert "Traceback" not in done.err


# --- validate -------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    Image.effect_noise((24, 24), 90).save(tmp_path / "a.png")
    return [
        {"image": "a.png", "prompt": "What is it?", "chosen": "a cat", "rejected": "a dog"},
        {"image": "a.png", "prompt": "Which one?", "chosen": "the left", "rejected": "the right"},
    ]


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_validate_good_data(run: Run, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = written(tmp_path, rows)
    done = run("validate", file)
    assert (done.code, done.err) == (0, "")
    assert "trl" in done.out
    done = run("validate", file, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert (report["format"], report["rows"], report["bad"], report["problems"]) == ("trl", 2, 0, [])


def test_validate_bad_data(run: Run, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = written(tmp_path, [*rows, {**rows[0], "image": "absent.png"}])
    done = run("validate", file)
    assert (done.code, done.err) == (1, "")
    assert "absent.png" in done.out
    done = run("validate", file, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert (report["rows"], report["bad"], len(report["problems"])) == (3, 1, 1)


def test_validate_with_a_wrong_file_or_format(run: Run, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    done = run("validate", tmp_path / "absent.jsonl")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("cwdpo: ")
    assert "absent.jsonl" in done.err
    done = run("validate", written(tmp_path, rows), "--format", "trll")
    assert (done.code, done.out) == (1, "")
    assert "'trl'" in done.err


# --- recipes --------------------------------------------------------------------------------------------


def test_recipe_schema_is_json(run: Run) -> None:
    done = run("recipe", "schema")
    assert done.code == 0
    assert set(json.loads(done.out)["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, (), "my.yaml: cannot be read (No such file or directory)"),
        ("data: {path: x}\nsed: 1\n", (), "my.yaml: unknown key 'sed'; did you mean 'seed'?"),
        ("data: {path: x}\n", ("train.batchsize=2",), "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ("data: {path: x}\n", ("seed",), "override 'seed': write section.key=value"),
        ("data: {path: x}\n", ("stage2={objective: dqo, learning_rate: 1}",), "did you mean 'dpo'?"),
    ],
    ids=["no-file", "unknown-key", "unknown-override", "bad-override", "unknown-objective"],
)  # fmt: skip
def test_train_refuses_a_wrong_recipe(
    run: Run, tmp_path: Path, text: str | None, overrides: tuple[str, ...], message: str
) -> None:
    recipe = tmp_path / "my.yaml"
    if text is not None:
        recipe.write_text(text)
    done = run("train", recipe, *overrides, "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("cwdpo: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_an_error_of_ours_sets_its_own_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def diverge(path: Path) -> None:
        raise NonFiniteError("loss is nan at step 3")

    monkeypatch.setattr("cwdpo.rundir.RunDir.open", diverge)
    assert run("report", tmp_path) == (4, "", "cwdpo: loss is nan at step 3\n")


# --- report ---------------------------------------------------------------------------------------------


def test_report_without_a_run(run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        done = run("report", folder)
        assert done == (1, "", f"cwdpo: {folder}: no run here (neither recipe.yaml nor summary.json)\n")


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cwdpo", "report", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cwdpo: ")
    assert "Traceback" not in done.stderr


def test_report_writes_the_page(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: small\n")
    done = run("report", tmp_path)
    assert done.code == 0
    assert done.out.strip() == str(tmp_path / "report.html")
    assert (
        (tmp_path / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    )


# --- init-model -----------------------------------------------------------------------------------------

SMALL = ("--width", 32, "--layers", 1, "--image-size", 24, "--vocabulary", 300)


def test_init_model_writes_a_folder_that_transformers_loads(run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    texts = tmp_path / "texts.txt"
    texts.write_text("a red circle\na blue square\n")
    folder = tmp_path / "model"
    done = run("init-model", folder, "--texts", texts, *SMALL)
    assert (done.code, done.out.strip()) == (0, str(folder))

    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.text_config.hidden_size == 32
    assert model.config.text_config.num_hidden_layers == 1
    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red circle"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.new("RGB", (30, 40), "red")], return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(processor.tokenizer))
    assert logits.isfinite().all()

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    done = run("init-model", folder, *SMALL)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"cwdpo: {folder} is not empty: choose another folder, or remove it first\n"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_init_model_is_repeatable_and_the_seed_matters(run: Run, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("init-model", tmp_path / name, *SMALL, "--seed", seed).code == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_init_model_names_what_is_wrong(run: Run, tmp_path: Path) -> None:
    done = run("init-model", tmp_path / "x", "--texts", tmp_path / "absent.txt")
    assert done.code == 1
    assert "absent.txt: cannot be read as UTF-8 text" in done.err
    done = run("init-model", tmp_path / "x", "--image-size", 50)
    assert (done.code, done.err) == (1, "cwdpo: patch_size 12 does not divide image_size 50\n")
    assert not (tmp_path / "x").exists()


def test_init_model_refuses_an_impossible_shape(run: Run, tmp_path: Path) -> None:
    # DEFECT: width not divisible by the four heads ends in a traceback of transformers or torch.
    done = run("init-model", tmp_path / "x", "--width", 30)
    assert done.code == 1
    assert done.err.startswith("cwdpo: ")
