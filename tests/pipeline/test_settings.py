"""Settings that cannot be honoured are refused by kind, and what is honoured but rarely meant is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cwdpo.config import parse_recipe
from cwdpo.errors import ModelError, RecipeError, RunDirError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.adapter import with_adapter_settings
from cwdpo.models.load import load_policy
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir
from cwdpo.stage.environment import check_environment
from cwdpo.stage.listener import Listener


def recipe(world: Path, model_path: Path, **changes: Any) -> Any:
    tree: dict[str, Any] = {
        "name": "settings",
        "model": {"path": str(model_path), "device": "cpu"},
        "data": {"path": str(world / "train.jsonl"), "validation_path": str(world / "validation.jsonl")},
        "stage1": {"enabled": False},
        "stage2": {"objective": {"name": "dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 1},
        "train": {"batch_size": 4, "logging_steps": 1, "warmup_steps": 0},
        "probes": {"every": 100, "prompts": 16},
        "evaluation": {"prompts": 0},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value}
    return parse_recipe(tree)


# --- an adapter that is trained further ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, world_folder: Path, model_folder: Path) -> Path:
    """A run's adapter of rank 4, alpha 8, on two kinds of layers."""
    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    out = tmp_path_factory.mktemp("runs") / "first"
    train_two_stage(recipe(world_folder, model_folder, model={"tune": "lora", "lora": lora}), out)
    return out / "model"


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 64}, "model.lora.r = 64, but the adapter that is trained further (FOLDER) has 4"),
        ({"alpha": 16}, "model.lora.alpha = 16, but the adapter that is trained further (FOLDER) has 8"),
        ({"target_modules": ["q_proj"]}, "model.lora.target_modules = ('q_proj',), but the adapter"),
        ({"target_modules": ".*k_proj"}, "model.lora.target_modules = '.*k_proj', but the adapter"),
    ],
)
def test_an_adapter_keeps_its_shape(
    adapter: Path, world_folder: Path, tmp_path: Path, lora: Any, said: str
) -> None:
    changed = recipe(world_folder, adapter, model={"tune": "lora", "lora": lora})
    with pytest.raises(ModelError) as caught:
        train_two_stage(changed, tmp_path / "more")
    assert said.replace("FOLDER", str(adapter)) in str(caught.value)
    assert "cwdpo export RUN --merge" in str(caught.value)
    assert not (tmp_path / "more").exists()
    with pytest.raises(ModelError, match="trained further"):
        load_policy(changed.model)


def test_all_linear_is_asked_of_the_loaded_model(adapter: Path, world_folder: Path, tmp_path: Path) -> None:
    changed = recipe(world_folder, adapter, model={"tune": "lora", "lora": {"target_modules": "all-linear"}})
    with pytest.raises(ModelError, match=r"'all-linear', but the adapter .* has none on .*k_proj"):
        train_two_stage(changed, tmp_path / "more")


def test_the_stored_recipe_says_what_was_trained(adapter: Path, world_folder: Path, tmp_path: Path) -> None:
    asked = {"tune": "lora", "lora": {"r": 4, "target_modules": ["v_proj", "q_proj"], "dropout": 0.25}}
    run = train_two_stage(recipe(world_folder, adapter, model=asked), tmp_path / "more")
    written = json.loads((run.path / "model" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 8, 0.25)
    import yaml

    stored = yaml.safe_load((run.path / "recipe.yaml").read_text())["model"]["lora"]
    assert (stored["r"], stored["alpha"], stored["dropout"]) == (4, 8, 0.25)
    assert set(stored["target_modules"]) == set(written["target_modules"]) == {"q_proj", "v_proj"}


def test_settings_are_filled_from_the_adapter(tmp_path: Path) -> None:
    config = {"r": 8, "lora_alpha": 32, "target_modules": ["b", "a"], "lora_dropout": 0.1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    settings = ModelSettings(path=str(tmp_path), tune="lora")
    filled = with_adapter_settings(settings).lora
    assert (filled.r, filled.alpha, filled.dropout, filled.target_modules) == (8, 32, 0.0, ("a", "b"))
    kept = with_adapter_settings(
        settings.model_copy(update={"lora": LoraSettings(target_modules="all-linear")})
    )
    assert kept.lora.target_modules == "all-linear"
    assert with_adapter_settings(ModelSettings(path=str(tmp_path))).lora == LoraSettings(), (
        "it will be merged"
    )
    assert with_adapter_settings(ModelSettings(tune="lora")).lora == LoraSettings(), "no adapter"
    (tmp_path / "adapter_config.json").write_text("{")
    assert with_adapter_settings(settings) == settings, "loading says what is wrong"


def test_dropout_of_an_adapter_is_the_recipe_s(adapter: Path) -> None:
    from torch import nn

    for share, kind in ((0.0, nn.Identity), (0.5, nn.Dropout)):
        settings = ModelSettings(
            path=str(adapter), device="cpu", tune="lora", lora=LoraSettings(dropout=share)
        )
        model = load_policy(settings).model
        layers = [m for name, m in model.named_modules() if name.endswith("lora_dropout.default")]
        assert layers
        assert all(type(layer) is kind and getattr(layer, "p", 0.0) == share for layer in layers)


def test_a_relative_base_is_named_as_such(
    adapter: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter made elsewhere names its base by a relative path; from another folder that is no hub id."""
    shutil.copytree(adapter, tmp_path / "run" / "model")
    shutil.copytree(model_folder, tmp_path / "bases" / "llava")
    file = tmp_path / "run" / "model" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "bases/llava"}))
    monkeypatch.chdir(tmp_path / "run")
    settings = ModelSettings(path=str(tmp_path / "run" / "model"), device="cpu")
    with pytest.raises(ModelError) as caught:
        load_policy(settings)
    said = str(caught.value)
    assert (
        f"its base 'bases/llava' is a relative path, and there is no such folder in {tmp_path / 'run'}"
        in said
    )
    assert f"there is one at {tmp_path / 'bases' / 'llava'}" in said
    assert f"set base_model_name_or_path in {file}" in said
    monkeypatch.chdir(tmp_path)
    assert load_policy(settings).trainable()


def test_a_trained_adapter_names_its_base_by_a_whole_path(
    world_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    started = recipe(world_folder, Path(model_folder.name), model={"tune": "lora"})
    run = train_two_stage(started, tmp_path / "run")
    config = json.loads((run.path / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    monkeypatch.chdir(tmp_path)
    assert load_policy(ModelSettings(path=str(run.path / "model"), device="cpu")).trainable()


# --- the environment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "bf16", "said"),
    [
        (
            "ACCELERATE_MIXED_PRECISION",
            "bf16",
            False,
            "contradicts train.bf16 = false.*set train.bf16 to true",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp16", False, "train.bf16 is the only mixed precision here"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", True, "contradicts train.bf16 = true"),
        ("ACCELERATE_MIXED_PRECISION", "FP8", True, "contradicts"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", False, "compiled models cannot be scored"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", False, "Megatron-LM is not used"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", False, "parallelism are not used"),
    ],
)
def test_accelerate_s_environment_may_not_contradict_the_recipe(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, bf16: bool, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=said):
        check_environment(bf16)


@pytest.mark.parametrize(
    ("value", "bf16"), [("no", False), ("no", True), ("bf16", True), ("", False), ("NO", True)]
)
def test_what_accelerate_launch_sets_by_itself_is_no_contradiction(
    monkeypatch: pytest.MonkeyPatch, value: str, bf16: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    check_environment(bf16)


def test_a_run_is_refused_before_it_begins(
    world_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match="ACCELERATE_MIXED_PRECISION=bf16"):
        train_two_stage(recipe(world_folder, model_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what is said -------------------------------------------------------------------------------------------


def test_one_row_without_validation_is_said(world_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    first = (world_folder / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(json.dumps({**json.loads(first), "annotator": "me"}))
    told: list[str] = []
    data = {"path": str(tmp_path / "one.jsonl"), "validation_path": None, "image_root": str(world_folder)}
    run = train_two_stage(
        recipe(world_folder, model_folder, data=data), tmp_path / "run", listener=Listener(note=told.append)
    )
    assert any("there are no probes, no stop rules and no evaluation" in note for note in told)
    assert any(
        "columns not read in training (kept for judges and metrics): annotator (1 rows)" in n for n in told
    )
    assert [row["note"] for row in read_jsonl(run.path / "notes.jsonl")] == told
    assert run.readings() == []


def test_half_precision_weights_are_said(world_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    run = train_two_stage(
        recipe(world_folder, model_folder, model={"dtype": "bfloat16"}),
        tmp_path / "run",
        listener=Listener(note=told.append),
    )
    assert any("an update below 1/256 of a weight is lost by rounding" in note for note in told)
    assert not (run.path / "notes.jsonl").exists(), "it is about the recipe, which is stored"


# --- names --------------------------------------------------------------------------------------------------


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "l\udce4uft"))
    with pytest.raises(RunDirError, match=r"bytes that are not UTF-8.*choose another --out"):
        run.lock()
    assert list(tmp_path.iterdir()) == []


def test_an_argument_that_is_no_text_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cwdpo", "train", "l\udce4uft.yaml"])
    run = RunDir(tmp_path / "run").create()
    run.write_environment()
    assert run.json("environment.json")["command"] == "cwdpo train l\udce4uft.yaml"
    run.append("problems.jsonl", [{"problem": "key '\udce4'"}])
    assert read_jsonl(run.path / "problems.jsonl") == [{"problem": "key '\udce4'"}]
