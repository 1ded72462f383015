"""``model.code``: a user's file registers a vision tower, and the checkpoint loads like those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.config import load_recipe, stored_model
from cwdpo.errors import ModelError, RecipeError
from cwdpo.evaluation.run import model_settings
from cwdpo.models.load import EMBEDDED, load_policy
from cwdpo.models.settings import ModelSettings

TYPE = "tower_of_a_test"
TOWER = f"""
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel

class Config(CLIPVisionConfig):
    model_type = {TYPE!r}

class Tower(CLIPVisionModel):
    config_class = Config

AutoConfig.register({TYPE!r}, Config)
AutoModel.register(Config, Tower)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The embedded model; its vision tower has a type that transformers does not know."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = TYPE
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The file that registers it."""
    (tmp_path / "tower.py").write_text(TOWER)
    return tmp_path / "tower.py"


def test_the_type_is_known_after_the_import(checkpoint: Path, code: Path) -> None:
    with pytest.raises(ModelError, match=TYPE):
        load_policy(ModelSettings(path=str(checkpoint)))
    for _ in range(2):  # a second load does not register again
        policy = load_policy(ModelSettings(path=str(checkpoint), code=str(code)))
    model: Any = policy.model
    assert type(model.model.vision_tower).__name__ == "Tower"
    wanted = load_policy(ModelSettings(path=str(EMBEDDED))).model.state_dict()
    found = policy.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    settings = ModelSettings(path="embedded", code=str(tmp_path / "none.py"))
    with pytest.raises(
        ModelError, match=r"model\.code '.*none\.py': there is no such file; allowed: a Python file"
    ):
        load_policy(settings)
    (tmp_path / "none.py").write_text("import this_is_not_installed")
    with pytest.raises(ModelError, match=r"none\.py' cannot be imported: ModuleNotFoundError: .*this_is_not"):
        load_policy(settings)


STORED = {"code": "code: tower.py", "remote": "trust_remote_code: true"}


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_recipe_runs_no_code_of_a_model_unless_it_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "environment.json").write_text("{}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{path: x}}\nmodel: {{{STORED[kind]}}}\n")
    key = STORED[kind].partition(":")[0]
    with pytest.raises(
        RecipeError, match=rf"recipe\.yaml: model\.{key} names code, .*a recipe in a run's folder"
    ):
        load_recipe(recipe)
    name = "tower.py" if kind == "code" else "remote"
    with pytest.raises(RecipeError, match=rf"--code '{name}'"):
        stored_model(recipe)
    with pytest.raises(RecipeError, match="names code"):
        stored_model(recipe, ["another.py"])
    value = "tower.py" if kind == "code" else "true"
    asked = load_recipe(recipe, [f"model.{key}={value}"]).model
    assert asked == stored_model(recipe, [name])


@pytest.mark.parametrize("command", ["evaluate", "ask", "export"])
def test_commands_ask_before_they_run_it(
    run: Callable[..., Any], tmp_path: Path, command: str, checkpoint: Path
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nraise ImportError('it ran')\n")
    (folder / "recipe.yaml").write_text(f"data: {{path: x}}\nmodel: {{code: {folder}/evil.py}}\n")
    shutil.copytree(checkpoint, folder / "model")
    more = {"evaluate": ["--data", "x"], "ask": ["what?"], "export": ["--out", tmp_path / "out"]}[command]
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    more = [tmp_path / "x.jsonl" if part == "x" else part for part in more]
    done = run(command, folder, *more)
    assert (done.code, "model.code names code" in done.err) == (1, True), done.err
    assert not mark.exists()
    done = run(command, folder, *more, "--code", folder / "evil.py")
    assert (done.code, "cannot be imported: ImportError: it ran" in done.err) == (1, True), done.err
    assert mark.exists()


def test_a_second_file_for_a_model_is_not_ignored() -> None:
    with pytest.raises(RecipeError, match=r"--code a\.py, b\.py: allowed: one file"):
        model_settings("some/model", ["a.py", "remote", "b.py"])
    found = model_settings("some/model", ["remote", "a.py"])
    assert (found.code, found.trust_remote_code) == ("a.py", True)


def test_a_checkpoint_that_was_read_from_gguf_is_refused(checkpoint: Path) -> None:
    from cwdpo.models.packages import check_packages

    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gguf"}})
    )
    with pytest.raises(ModelError, match=r"read from a GGUF file, .*remove quantization_config"):
        check_packages(ModelSettings(path=str(checkpoint), tune="lora"))
