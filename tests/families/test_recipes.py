"""Every recipe of the package for a real model, run on the tiny checkpoint of its family; only path, steps, lengths of
samples and device are others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FAMILIES, write
from shapes import write_shape
from transformers import AutoConfig

from cwdpo import shipped
from cwdpo.config import load_recipe
from cwdpo.models.memory import empty_model

TWINS = {
    "qwen2_5_vl_3b_lora": "qwen2_5_vl",
    "qwen2_5_vl_3b_rlaifv": "qwen2_5_vl",
    "qwen2_5_vl_7b_lora": "qwen2_5_vl",
    "qwen2_5_vl_7b_nf4": "qwen2_5_vl",
    "qwen2_5_vl_7b_full_fsdp": "qwen2_5_vl",
    "qwen2_5_vl_72b_nf4": "qwen2_5_vl",
    "qwen3_vl_8b_lora": "qwen3_vl",
    "smolvlm2_2b_full": "smolvlm2",
    "internvl3_8b_lora": "internvl3",
    "gemma3_4b_lora": "gemma3",
    "llava_onevision_7b_lora": "llava_onevision",
}
HUB = {"qwen2_5_vl": "Qwen2.5-VL-", "qwen3_vl": "Qwen3-VL-", "smolvlm2": "SmolVLM2-", "internvl3": "InternVL3-",
       "gemma3": "gemma-3-", "llava_onevision": "llava-onevision-"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with a picture of their own each."""
    from test_matrix import write_data

    from conftest import rows

    return write_data(tmp_path_factory.mktemp("recipes"), [e for e in rows() if e.id == "picture"], 8)


def test_every_recipe_of_a_hub_model_has_its_twin() -> None:
    of_the_hub = {name for name in shipped.names() if "/" in load_recipe(name).model.path}
    assert of_the_hub == set(TWINS)
    for name, family in TWINS.items():
        assert load_recipe(name).model.path.split("/")[1].startswith(HUB[family])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(family)) for name, family in TWINS.items()]
)
def test_a_recipe_runs_on_the_twin_of_its_model(
    run: Any, name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, asked = write(TWINS[name], tmp_path / "checkpoint", 12), load_recipe(name)
    overrides = [
        f"model.path={checkpoint}", "model.device=cpu", f"data.path={data}", "data.validation_path=null",
        "data.validation_fraction=0.25",
        "stage1.steps=1", "stage2.steps=2", "train.gradient_accumulation_steps=1", "calibration.samples=4",
        "calibration.max_new_tokens=4", "evaluation.max_new_tokens=4",
    ]  # fmt: skip
    checked = run(
        "validate", name, f"model.path={checkpoint}", f"data.path={data}", "data.validation_path=null"
    )
    assert checked.code == 0, checked.out + checked.err
    done = run("train", name, *overrides, "--out", "out")
    assert done.code == 0, done.err[-3000:]
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary, summary
    resolved = load_recipe(Path("out/recipe.yaml"))
    assert resolved.model.quantization == asked.model.quantization
    assert resolved.train.optimizer == asked.train.optimizer
    adapter = (tmp_path / "out" / "model" / "adapter_config.json").is_file()
    assert adapter == (asked.model.tune == "lora")


@pytest.mark.parametrize(
    ("size", "published"), [("3b", 3_754_622_976), ("7b", 8_292_166_656), ("72b", 73_410_777_344)]
)
def test_the_shapes_behind_the_recipes_figures_have_the_published_parameters(
    size: str, published: int, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(write_shape(size, tmp_path))
    assert sum(p.numel() for p in empty_model(config, "bfloat16").parameters()) == published


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]
)
def test_init_writes_a_recipe_for_every_family(
    run: Any, family: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(family, tmp_path / "checkpoint", 12)
    done = run("init", "--model", "checkpoint", "--data", data, "--gpu", "l4", "--out", "my.yaml")
    assert done.code == 0, done.err[-3000:]
    assert "fits     LoRA on bf16 weights" in done.out
    recipe = load_recipe("my.yaml")
    assert (recipe.model.tune, recipe.train.batch_size) == ("lora", 1)
    validated = run("validate", "my.yaml")
    assert validated.code == 0, validated.out
    if family in TWINS.values():
        short = ["stage1.steps=1", "stage2.steps=1", "calibration.samples=2", "evaluation.prompts=1"]
        trained = run("train", "my.yaml", *short, "model.device=cpu")
        assert trained.code == 0, trained.err[-3000:]
