"""`cwdpo train`, `report`, `init-model` and `recipe schema`: what they write, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.config import Recipe, load_recipe
from paths import RECIPES

Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err

# --- recipes --------------------------------------------------------------------------------------------


def test_recipe_schema_is_json(run: Run) -> None:
    done = run("recipe", "schema")
    assert done.code == 0
    assert set(json.loads(done.out)["properties"]) == set(Recipe.model_fields)


def test_recipes_of_the_package_are_listed_shown_copied_and_run_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = run("recipe", "list")
    assert listed.code == 0
    names = [line.split()[0] for line in listed.out.splitlines()]
    assert {"tiny", "on_policy", "photos", "qwen2_5_vl_3b_lora", "base"} <= set(names)
    assert all(len(line.split()) > 4 for line in listed.out.splitlines()), "each with what it is"
    for name in names:
        shown = run("recipe", "show", name)
        assert shown.out == (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        assert load_recipe(name).name == load_recipe(RECIPES / f"{name}.yaml").name
    copied = run("recipe", "copy", "tiny")
    assert (copied.code, copied.out) == (0, "tiny.yaml: edit it, then: cwdpo validate tiny.yaml\n")
    assert "exists" in run("recipe", "copy", "tiny").err
    assert run("recipe", "copy", "qwen2_5_vl_3b_lora", "my.yaml").code == 0
    assert load_recipe("my.yaml").model.tune == "lora"
    (tmp_path / "on_policy").write_text("name: mine\ndata: {path: x.jsonl}\n")
    assert load_recipe("on_policy").name == "mine", "a file comes before a name"
    for wrong in (("recipe", "show", "tinny"), ("train", "tinny")):
        said = run(*wrong)
        assert said.code == 1
        assert "did you mean 'tiny'" in said.err
    near = run("train", "qwen2.5-vl-7b")
    assert all(f"'qwen2_5_vl_7b_{way}'" in near.err for way in ("lora", "nf4", "full_fsdp"))
    assert "`cwdpo recipe list`" in run("recipe", "show", "zzzz").err


def test_a_shipped_name_is_a_recipe_for_every_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("validate", "sample"):
        said = run(command, "gemma3_4b_lora", "data.path=absent.jsonl")
        assert said.code == 1
        assert "absent.jsonl" in said.err, "it was read as a recipe"
    said = run("validate", "tiny")
    assert "tiny: data.world is generated" in said.err
    (tmp_path / "tiny").mkdir()
    assert load_recipe("tiny").data.world is not None, "a folder of that name is no recipe"


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


# --- report ---------------------------------------------------------------------------------------------


def test_report_without_a_run(run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        done = run("report", folder)
        assert done == (1, "", f"cwdpo: {folder}: no run here (neither recipe.yaml nor summary.json)\n")


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


def test_init_model_is_whole_or_not_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    left = tmp_path / ".model.0123456789abcdef.tmp"
    left.mkdir()
    (left / "config.json").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr("cwdpo.models.tiny.save_weights", killed)
        assert run("init-model", tmp_path / "model", *SMALL).code == 130
    assert list(tmp_path.iterdir()) == []
    assert run("init-model", tmp_path / "model", *SMALL).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


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


def test_a_folder_with_a_run_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['cwdpo', 'train', 'tiny', '--out', {str(tmp_path)!r}]\n"
        "try:\n    runpy.run_module('cwdpo', run_name='__main__')\n"
        "except SystemExit as error:\n    print(error.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "False"], done.stderr
    assert "already contains a run: continue it with --resume" in done.stderr


def test_an_interrupt_says_what_is_kept(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(recipe: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "recipe.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("cwdpo.pipeline.two_stage.train_two_stage", interrupted)
    done = run("train", "tiny", "--out", tmp_path / "a", "train.save_steps=7")
    assert done.code == 130
    kept = "the run folder keeps finished stages and a checkpoint every 7 steps"
    assert f"cwdpo: interrupted; {kept}: give the command again with --resume" in done.err
    done = run("train", "tiny", "--out", tmp_path / "b", "train.save_steps=null")
    assert "the run folder keeps finished stages: give" in done.err
