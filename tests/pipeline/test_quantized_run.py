"""Whole runs with a quantized base: killed and resumed, in rounds, evaluated, sampled from, exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cwdpo.config import parse_recipe
from cwdpo.files.reading import read_jsonl
from cwdpo.models.quantization import quantized_layers
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.trainer.trainer import PreferenceTrainer

KINDS = ("nf4", "int8")


class Killed(BaseException):
    """Stands in for a kill: nothing may catch it to tidy up what a kill would leave."""


def recipe(world: Path, kind: str) -> Any:
    return parse_recipe(
        {
            "model": {
                "path": "embedded", "device": "cpu", "tune": "lora", "lora": {"r": 4}, "quantization": kind,
                "quantization_options": {"skip": ["vision"]},
            },
            "data": {"path": str(world / "train.jsonl"), "validation_path": str(world / "validation.jsonl"),
                     "stage1_fraction": 0.5, "limit": 12},
            "negatives": {"on_policy_fraction": 0.5, "rounds": 2,
                          "sampler": {"samples": 2, "max_new_tokens": 32, "batch_size": 8}},
            "stage1": {"objective": "sft", "learning_rate": 1e-3, "steps": 2},
            "stage2": {"objective": {"name": "dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 4},
            "train": {"batch_size": 2, "logging_steps": 1, "save_steps": 2, "warmup_steps": 0,
                      "gradient_checkpointing": True},
            "probes": {"every": 2, "prompts": 2},
            "evaluation": {"prompts": 2, "samples": 1, "max_new_tokens": 5},
            "stop": [],
        }
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: Any, tmp_path_factory: pytest.TempPathFactory, world_folder: Path
) -> tuple[str, RunDir]:
    out = tmp_path_factory.mktemp("runs") / request.param
    return request.param, train_two_stage(recipe(world_folder, request.param), out)


def content(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "readings.jsonl", "samples.jsonl", "pool.jsonl", "rounds.jsonl", "inputs.json")
    found = {name: (run / name).read_bytes() for name in names}
    return found | {
        path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("adapter_model.safetensors")
    }


@pytest.mark.slow
def test_the_first_loss_is_ln_2_and_the_adapter_learns(finished: tuple[str, RunDir]) -> None:
    _, run = finished
    rows = [
        row for row in read_jsonl(run.path / "metrics.jsonl") if row["stage"] == "stage2" and "loss" in row
    ]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    adapter = load_file(run.path / "model" / "adapter_model.safetensors")
    assert all(bool(values.any()) for name, values in adapter.items() if "lora_B" in name)
    assert len(read_jsonl(run.path / "rounds.jsonl")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("stage1", 2), ("stage2", 3)])
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(
    finished: tuple[str, RunDir],
    world_folder: Path,
    model_folder: Path,
    tmp_path: Path,
    stage: str,
    step: int,
) -> None:
    kind, straight = finished

    def kill(name: str, now: int, total: int) -> None:
        if (name, now) == (stage, step):
            raise Killed

    asked = recipe(world_folder, kind)
    with pytest.raises(Killed):
        train_two_stage(asked, tmp_path / "run", listener=Listener(step=kill))
    resumed = train_two_stage(asked, tmp_path / "run", resume=True)
    assert content(resumed.path) == content(straight.path)


def test_the_run_is_evaluated_and_sampled_from_as_it_was_trained(
    finished: tuple[str, RunDir],
    world_folder: Path,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cwdpo.evaluation import run as evaluation
    from cwdpo.onpolicy import sampler

    _, trained = finished
    loaded: list[Any] = []
    for module in (evaluation, sampler):
        real = module.load_policy

        def remembered(*given: Any, real: Any = real, **named: Any) -> Any:
            loaded.append(real(*given, **named))
            return loaded[-1]

        monkeypatch.setattr(module, "load_policy", remembered)
    data = world_folder / "validation.jsonl"
    done = run(
        "evaluate", trained.path, "--data", data, "--out", tmp_path / "e", "--limit", 4, "--max-new-tokens", 8,
        "--metrics", "length",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["numbers"]
    done = run(
        "sample",
        trained.path / "recipe.yaml",
        "--out",
        tmp_path / "p.jsonl",
        "--model",
        trained.path / "model",
    )
    assert done.code == 0, done.err
    assert len(loaded) == 2
    for policy in loaded:
        assert list(quantized_layers(policy.model))
        adapters = {n: p for n, p in policy.model.named_parameters() if "lora_B" in n}
        assert any(bool(p.any()) for p in adapters.values())


def test_the_run_is_exported(finished: tuple[str, RunDir], tmp_path: Path, run: Any) -> None:
    from transformers import AutoModelForImageTextToText

    kind, trained = finished
    done = run("export", trained.path, "--merge", "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert f"The base was quantized ({kind}) in training" in " ".join(done.out.split())
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_sharded_run_is_refused(
    finished: tuple[str, RunDir], world_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from cwdpo.errors import RecipeError

    monkeypatch.setattr(PreferenceTrainer, "_sharded", property(lambda self: True))
    with pytest.raises(RecipeError, match=r"model\.quantization: quantized weights are not sharded"):
        train_two_stage(recipe(world_folder, finished[0]), tmp_path / "run")
