"""transformers' TrainingArguments in a recipe: each is passed on, set by the recipe, or refused with a reason."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from cwdpo.arguments import OWNED, PASSED, REFUSED
from cwdpo.config import Recipe, parse_recipe
from cwdpo.errors import RecipeError
from cwdpo.pipeline import run_stage
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.trainer.trainer import PreferenceTrainer

NAMES = [field.name for field in fields(TrainingArguments)]


def recipe(*, model: Any = None, data: Any = None, **train: Any) -> Any:
    return parse_recipe(
        {
            "model": {"device": "cpu", **(model or {})}, "data": data or {"path": "absent.jsonl"}, "train": train,
            "stage1": {"enabled": False},
            "stage2": {"objective": "dpo", "learning_rate": 1e-4, "steps": 1},
            "probes": {"prompts": 2}, "evaluation": {"prompts": 0},
        }
    )  # fmt: skip


def test_every_argument_of_the_installed_transformers_is_in_one_table() -> None:
    tables = [set(PASSED), set(OWNED), set(REFUSED)]
    assert set.union(*tables) == set(NAMES)
    assert sum(map(len, tables)) == len(NAMES)


def test_owned_arguments_name_keys_that_exist() -> None:
    for place in OWNED.values():
        for key in place.split(" and "):
            if key.startswith("the option"):
                continue
            section: Any = Recipe
            for part in key.split("."):
                section = section.model_fields[part].annotation


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_is_passed_owned_or_refused(name: str) -> None:
    if name in PASSED:
        assert recipe(arguments={name: 1}).train.arguments == {name: 1}
        return
    with pytest.raises(RecipeError) as error:
        recipe(arguments={name: 1})
    reason = f"the recipe sets it by {OWNED[name]}" if name in OWNED else REFUSED[name]
    assert f"train.arguments: {name}: {reason}" in str(error.value)


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"adam_epsilonn: .* no such argument; did you mean 'adam_epsilon'"):
        recipe(arguments={"adam_epsilonn": 1e-8})


def test_arguments_reach_the_trainer(
    world_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PreferenceTrainer] = []
    real = run_stage.make_trainer
    monkeypatch.setattr(run_stage, "make_trainer", lambda *a, **n: made.append(real(*a, **n)) or made[-1])
    asked = recipe(
        model={"path": str(model_folder)}, data={"path": str(world_folder / "train.jsonl"), "limit": 8},
        arguments={"optim": "adafactor", "adam_epsilon": "1e-6", "lr_scheduler_kwargs": {"num_cycles": 2}},
        lr_scheduler_type="cosine_with_restarts", batch_size=2,
    )  # fmt: skip
    train_two_stage(asked, tmp_path / "run")
    (trainer,) = made
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor"
    assert trainer.args.adam_epsilon == 1e-6
    assert trainer.args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"optim": "adamw_torch_fuse"}, "adamw_torch_fuse"),
        ({"optim": "lomo"}, "lomo"),
        ({"debug": "everything"}, "everything"),
    ],
)
def test_wrong_values_stop_a_run_before_the_data(arguments: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        train_two_stage(recipe(arguments=arguments), tmp_path / "run")
    assert str(error.value).startswith("train.arguments")
    assert reason in str(error.value)
    assert "absent.jsonl" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        ({}, "float32"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float32", "tune": "lora"}, "float32"),
        ({"dtype": "bfloat16"}, None),
        ({"tune": "lora"}, None),  # known when the checkpoint is loaded
    ],
)
def test_adamw_kahan_is_refused_where_no_weight_can_be_bf16(
    model: dict[str, Any], refused: str | None
) -> None:
    if refused is None:
        assert recipe(model=model, optimizer="adamw_kahan").train.optimizer == "adamw_kahan"
        return
    with pytest.raises(RecipeError, match=rf"adamw_kahan is for trained weights in bf16, not in {refused}"):
        recipe(model=model, optimizer="adamw_kahan")


def test_two_optimizers_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"arguments\.optim and optimizer: adamw_kahan are two optimizers"):
        recipe(model={"dtype": "bfloat16"}, optimizer="adamw_kahan", arguments={"optim": "adafactor"})
