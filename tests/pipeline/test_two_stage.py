"""Whole runs on small models: two stages, LoRA, resume, the TRL-style trainer, a user's own objective."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from cwdpo.config import parse_recipe
from cwdpo.errors import DataError, ModelError, RecipeError, RunDirError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.load import freeze, load_policy
from cwdpo.pipeline import two_stage
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir
from cwdpo.trainer.trainer import PreferenceTrainer


def recipe(world: Path, folder: Path, /, **changes):
    tree = {
        "name": "small",
        "model": {"path": str(folder), "device": "cpu"},
        "data": {
            "path": str(world / "train.jsonl"),
            "validation_path": str(world / "validation.jsonl"),
            "stage1_fraction": 0.5,
        },
        "stage1": {"objective": "sft_constrained", "learning_rate": 1e-3, "steps": 4},
        "stage2": {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 6},
        "train": {"batch_size": 4, "logging_steps": 1, "save_steps": 2, "warmup_steps": 2},
        "calibration": {"samples": 8, "max_new_tokens": 6},
        "probes": {"every": 3, "prompts": 6},
        "evaluation": {"prompts": 2, "max_new_tokens": 6},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_recipe(tree)


OPTIMIZERS: list[tuple[str, bool]] = []
"""Of the run ``finished``, in order: an optimizer was made, or a model saved; whether one is in memory."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world_folder, model_folder) -> RunDir:
    made = []
    create, save = PreferenceTrainer.create_optimizer, two_stage.save_model

    def creating(self, model=None):
        OPTIMIZERS.append(("made", any(ref() is not None for ref in made)))
        made.append(weakref.ref(create(self, model)))
        return made[-1]()

    def saving(*args):
        OPTIMIZERS.append(("saved", any(ref() is not None for ref in made)))
        save(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceTrainer, "create_optimizer", creating)
        patch.setattr(two_stage, "save_model", saving)
        return train_two_stage(recipe(world_folder, model_folder), tmp_path_factory.mktemp("runs") / "small")


def test_the_optimizer_of_a_stage_is_gone_when_it_ends(finished) -> None:
    assert OPTIMIZERS == [("made", False), ("saved", False)] * 2


def test_a_run_says_where_its_time_went(finished) -> None:
    rows = [row for row in read_jsonl(finished.path / "timings.jsonl") if "parts" in row]
    assert [r["stage"] for r in rows[:2]] == ["start", "stage1"]
    assert rows[-1]["stage"] == "end"
    spent = sum(seconds for row in rows for seconds in row["parts"].values())
    assert spent == pytest.approx(rows[-1]["elapsed"], abs=0.001 * len(rows) * 10)
    steps = {"step: forward", "step: backward", "step: optimizer", "probes", "encoding"}
    for stage, more in (("stage1", set()), ("stage2", {"reference pass", "calibration"})):
        own = [row for row in rows if row["stage"] == stage]
        assert steps | more | {"checkpoints"} <= {name for row in own for name in row["parts"]}
        logged = [row["step"] for row in finished.metrics() if row["stage"] == stage and "loss" in row]
        assert [row["step"] for row in own][: len(logged)] == logged
        assert own[-1]["remaining"] == 0
    page = (finished.path / "report.html").read_text()
    assert page.index("Where the time went") < page.index("step: forward")


def test_a_run_folder_explains_itself(finished, world_folder, model_folder) -> None:
    for name in ("recipe.yaml", "environment.json", "calibration.json", "summary.json", "report.html"):
        assert (finished.path / name).is_file(), name
    stages = {row["stage"] for row in finished.metrics()}
    assert stages == {"stage1", "stage2"}
    rows = [r for r in finished.metrics() if r["stage"] == "stage2" and "cooling/weight_mean" in r]
    calibration = finished.json("calibration.json")
    assert rows
    assert {(r["cooling/floor"], r["cooling/tau"]) for r in rows} == {
        (calibration["floor"], calibration["tau"])
    }
    names = {r["name"] for r in finished.readings() if r["stage"] == "stage2"}
    assert {"chosen_shift", "rejected_shift", "margin", "entropy", "top1", "tv", "js", "kl", "ece"} <= names
    assert any(n.startswith("cooling/weight/") for n in names)
    assert all(r["n"] > 0 for r in finished.readings() if r["value"] is not None)
    assert {r["step"] for r in finished.readings() if r["stage"] == "stage2"} == {0, 3, 6}


def test_stage_2_starts_from_zero_shift_against_stage_1(finished) -> None:
    start = {r["name"]: r["value"] for r in finished.readings() if r["stage"] == "stage2" and r["step"] == 0}
    for name in ("chosen_shift", "rejected_shift", "margin", "kl", "tv"):
        assert start[name] == pytest.approx(0, abs=1e-6), name
    first = next(r for r in finished.metrics() if r["stage"] == "stage2")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_the_final_model_loads_without_cwdpo(finished) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(finished.path / "model")
    processor = AutoProcessor.from_pretrained(finished.path / "model")
    assert processor.tokenizer.eos_token == "<|end|>"
    stage1 = AutoModelForImageTextToText.from_pretrained(finished.path / "stage1" / "model")
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), stage1.parameters(), strict=True)
    ]
    assert max(moved) > 1e-4


def test_checkpoints_hold_the_processor(finished) -> None:
    kept = sorted((finished.path / "stage2").glob("checkpoint-*"))
    assert kept
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert (kept[-1] / name).is_file(), name
    assert (kept[-1] / "processor_config.json").is_file()


def test_a_second_start_refuses_and_harms_nothing(finished, world_folder, model_folder) -> None:
    before = {p: p.read_bytes() for p in finished.path.glob("*.json*")}
    with pytest.raises(RunDirError, match="--resume"):
        train_two_stage(recipe(world_folder, model_folder), finished.path)
    with pytest.raises(RecipeError, match="another recipe"):
        train_two_stage(recipe(world_folder, model_folder, seed=3), finished.path, resume=True)
    assert before == {p: p.read_bytes() for p in finished.path.glob("*.json*")}


@pytest.mark.parametrize("interrupted", [pytest.param("stage1", marks=pytest.mark.slow), "stage2"])
def test_resume_ends_where_the_uninterrupted_run_ends(
    finished, interrupted, world_folder, model_folder, tmp_path
) -> None:
    from safetensors.torch import load_file

    from cwdpo.stage.listener import Listener

    def stop(stage: str, step: int, steps: int) -> None:
        if (stage, step) == (interrupted, 3):
            raise KeyboardInterrupt

    settings = recipe(world_folder, model_folder)
    with pytest.raises(KeyboardInterrupt):
        train_two_stage(settings, tmp_path / "run", listener=Listener(step=stop))
    again = train_two_stage(settings, tmp_path / "run", resume=True)
    expected = load_file(finished.path / "model" / "model.safetensors")
    for name, value in load_file(again.path / "model" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    plain = [{k: v for k, v in r.items() if k not in timings} for r in again.metrics()]
    assert plain == [{k: v for k, v in r.items() if k not in timings} for r in finished.metrics()]
    assert again.readings() == finished.readings()


def test_lora_trains_the_adapter_only(world_folder, model_folder, tmp_path) -> None:
    settings = recipe(
        world_folder, model_folder, model={"tune": "lora", "lora": {"r": 4, "alpha": 8}, "freeze": ["vision"]}
    )
    policy = load_policy(settings.model)
    names = list(policy.trainable())
    assert names
    assert all("lora_" in n for n in names)
    assert not any("vision_tower" in n for n in names)
    run = train_two_stage(settings, tmp_path / "run")
    assert (run.path / "model" / "adapter_model.safetensors").is_file()
    base = load_policy(settings.model.model_copy(update={"tune": "full", "freeze": ()})).model.state_dict()
    trained = load_policy(
        settings.model.model_copy(update={"path": str(run.path / "model"), "tune": "full", "freeze": ()})
    ).model.state_dict()
    changed = {n for n in base if not torch.equal(base[n], trained[n])}
    assert changed, "the merged adapter must change the model"
    assert not any("vision_tower" in n for n in changed)


def test_freezing_by_name(model) -> None:
    freeze(model, ("vision", "projector"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any("vision_tower" in n or "projector" in n for n in trained)
    with pytest.raises(ModelError, match="'audio' matches no parameter"):
        freeze(model, ("audio",))


def test_a_users_own_objective_trains(world_folder, model_folder, tmp_path) -> None:
    (tmp_path / "my_file.py").write_text(
        "from cwdpo.objectives.base import Objective, ObjectiveOutput\n"
        "class MyLoss(Objective):\n"
        "    scale: float = 1.0\n"
        "    def __call__(self, pairs):\n"
        "        margin = pairs.chosen_shift - pairs.rejected.shift\n"
        "        return ObjectiveOutput(pairs.mean_over_prompts((1 - self.scale * margin).clamp_min(0)))\n"
    )
    objective = {"name": f"{tmp_path / 'my_file.py'}:MyLoss", "scale": 0.5}
    settings = recipe(
        world_folder, model_folder, stage1={"enabled": False}, stage2={"objective": objective, "steps": 3}
    )
    run = train_two_stage(settings, tmp_path / "run")
    losses = [r["loss"] for r in run.metrics() if "loss" in r]
    assert losses[0] == pytest.approx(1.0, abs=1e-4)
    assert losses[-1] != losses[0]


def test_rows_that_do_not_fit_are_reported_and_too_many_stop_the_run(
    world_folder, model_folder, tmp_path
) -> None:
    settings = recipe(world_folder, model_folder, data={"max_length": 40, "max_bad_fraction": 1.0})
    run = train_two_stage(settings, tmp_path / "a")
    problems = [
        json.loads(line)["problem"] for line in (run.path / "problems.jsonl").read_text().splitlines()
    ]
    assert any("max_length = 40" in p and "train.jsonl:" in p for p in problems)
    with pytest.raises(DataError, match="max_bad_fraction"):
        train_two_stage(recipe(world_folder, model_folder, data={"max_length": 40}), tmp_path / "b")


def test_the_trl_style_trainer_takes_trl_rows(world_folder, model_folder, tmp_path) -> None:
    import cwdpo

    rows = []
    for line in (world_folder / "train.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        image = {"bytes": (world_folder / row["images"][0]).read_bytes(), "path": None}
        rows.append({k: row[k] for k in ("prompt", "chosen", "rejected")} | {"images": [image]})
    args = cwdpo.CWDPOConfig(
        output_dir=str(tmp_path), beta=0.3, max_steps=2, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, logging_steps=1, learning_rate=1e-3, save_strategy="no", calibration_samples=6,
        calibration_max_new_tokens=5, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = cwdpo.CWDPOTrainer(model=str(model_folder), args=args, train_dataset=rows)
    assert trainer.objective.beta == 0.3
    assert isinstance(trainer.objective.floor, float)
    trainer.train()
    logged = [r for r in trainer.state.log_history if "rewards/margins" in r]
    assert len(logged) == 2
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_folder_without_weights_or_processor_is_named(tmp_path, model_folder) -> None:
    import shutil

    from cwdpo.config import ModelSettings

    with pytest.raises(ModelError, match="no such folder"):
        load_policy(ModelSettings(path=str(tmp_path / "nothing")))
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\*.safetensors"):
        load_policy(ModelSettings(path=str(tmp_path / "m")))


def test_full_fine_tuning_of_a_half_precision_checkpoint_keeps_its_weights_in_fp32(
    tmp_path, model, processor
) -> None:
    """Updates at 1e-5 round away in bf16; LoRA trains its own fp32 weights on the checkpoint's dtype."""
    from cwdpo.config import ModelSettings

    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    full = load_policy(ModelSettings(path=str(tmp_path / "half"), device="cpu"))
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    lora = load_policy(ModelSettings(path=str(tmp_path / "half"), device="cpu", tune="lora"))
    assert {p.dtype for p in lora.trainable().values()} == {torch.float32}
    assert {p.dtype for p in lora.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_an_adapter_folder_is_trained_further_not_wrapped_again(world_folder, model_folder, tmp_path) -> None:
    settings = recipe(
        world_folder,
        model_folder,
        model={"tune": "lora", "lora": {"r": 4, "alpha": 8}},
        stage1={"enabled": False},
        stage2={"objective": "dpo", "steps": 2},
    )
    first = train_two_stage(settings, tmp_path / "first").path / "model"
    again = settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(first)})})
    second = train_two_stage(again, tmp_path / "second").path / "model"
    full = settings.model.model_copy(update={"tune": "full"})
    weights = [
        load_policy(full.model_copy(update={"path": str(p)})).model.state_dict()
        for p in (model_folder, first, second)
    ]
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    base, once, twice = (w[name] for w in weights)
    assert not torch.equal(base, once)
    assert not torch.equal(once, twice)
    # Two steps more from where the first run ended, not two steps from the bare base.
    assert (twice - once).norm() < 2 * (once - base).norm()
    assert not torch.allclose(twice - base, once - base, atol=1e-7)
