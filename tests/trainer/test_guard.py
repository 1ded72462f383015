"""The guard: a run stops before a non-finite update, says where, and leaves out updates whose gradient is a spike."""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from cwdpo.errors import NonFiniteError, RecipeError
from cwdpo.models.saved import load_weights
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.scoring.pairs import reference_pass
from cwdpo.trainer.guard import Guard, gradient_norm
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions


@pytest.fixture
def encoded(encoder, examples, model):
    return reference_pass(model, encoder.encode_all(examples[:24], "rejected", require_negative=True)[0])


def trainer_of(model, encoded, folder, *, guard=None, callbacks=(), **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        **changes,
    }
    logs: list[dict] = []
    trainer = PreferenceTrainer(
        model, TrainingArguments(**settings), OBJECTIVES.build({"name": "dpo", "sft_weight": 0.5}), encoded,
        callbacks=callbacks,
        options=TrainerOptions(guard=guard, on_log=lambda row: logs.append(dict(row)), group_by_length=False),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.kept_logs = logs
    return trainer


def told(folder):
    return json.loads((folder / "nonfinite.json").read_text())


def spoilt(example):
    images = {k: torch.full_like(v, math.nan) for k, v in example.prompt.images.items()}
    return replace(example, prompt=replace(example.prompt, load_images=lambda: images))


def test_a_nan_in_one_image_names_that_example_and_leaves_the_checkpoint(model, encoded, tmp_path) -> None:
    # Row 11 is drawn in the third step of this seed's first epoch.
    encoded[11] = spoilt(encoded[11])
    policy = copy.deepcopy(model)
    trainer = trainer_of(policy, encoded, tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteError, match=rf"step 3: the loss is nan on examples {encoded[11].id};"):
        trainer.train()
    row = told(tmp_path)
    assert (row["step"], row["found_in"], row["n_parameters"]) == (3, "loss", 0)
    (batch,) = row["micro_batches"]
    assert batch["loss"] == "nan"
    assert batch["parts"]["loss/nll"] == "nan"
    assert len(batch["examples"]) == 8
    (bad,) = [e for e in batch["examples"] if not e["finite"]]
    assert bad == {
        "id": encoded[11].id,
        "prompt_tokens": len(encoded[11].prompt.input_ids),
        "chosen_tokens": len(encoded[11].chosen.ids),
        "negative_tokens": [len(c.ids) for c in encoded[11].negatives],
        "finite": False,
    }
    # The checkpoint before it holds the weights as they still are: nothing was updated since.
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    saved = copy.deepcopy(model)
    load_weights(saved, tmp_path / "checkpoint-2")
    for (name, a), b in zip(policy.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_update(model, encoded, tmp_path) -> None:
    policy = copy.deepcopy(model)
    name, parameter = next((n, p) for n, p in policy.named_parameters() if "mlp.down_proj" in n)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    trainer = trainer_of(policy, encoded, tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is not finite .*nothing was updated"):
        trainer.train()
    row = told(tmp_path)
    assert (row["found_in"], row["parameters"], row["n_parameters"]) == ("gradient", [name], 1)
    assert [len(b["examples"]) for b in row["micro_batches"]] == [8, 8]
    assert all(isinstance(b["loss"], float) for b in row["micro_batches"])
    for a, b in zip(policy.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


class Spoil(TrainerCallback):
    """Makes one weight infinite in the update of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **_) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.get_input_embeddings().weight[5, 3] = math.inf


def test_a_parameter_that_an_update_makes_infinite_is_never_saved(model, encoded, tmp_path) -> None:
    trainer = trainer_of(model, encoded, tmp_path, callbacks=[Spoil(2)], save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteError, match=r"step 2: parameters are not finite .*embed_tokens"):
        trainer.train()
    assert told(tmp_path)["found_in"] == "parameter"
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_not_trained(model, encoded, tmp_path) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 3] = math.nan
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(NonFiniteError, match="step 0: parameters are not finite"):
        trainer_of(model, encoded, tmp_path).train()


class Amplify(TrainerCallback):
    """Multiplies the gradients of one step by 1000, and keeps the weights around its update."""

    def __init__(self, model, step: int) -> None:
        self.step, self.now, self.around = step, 0, []
        for parameter in model.parameters():
            parameter.register_hook(lambda g: g * 1000 if self.now + 1 == self.step else g)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        if self.now + 1 == self.step:
            self.around.append([p.detach().clone() for p in model.parameters()])

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.now = state.global_step
        if self.now == self.step:
            self.around.append([p.detach().clone() for p in model.parameters()])


@pytest.mark.parametrize("factor", [20.0, None])
def test_a_spike_is_left_out_counted_and_logged(model, encoded, tmp_path, caplog, factor) -> None:
    amplify = Amplify(model, 4)
    guard = Guard(tmp_path, factor, spike_window=3)
    trainer = trainer_of(model, encoded, tmp_path, guard=guard, callbacks=[amplify], optim="adamw_torch")
    with caplog.at_level(logging.WARNING, "cwdpo.trainer.guard"):
        trainer.train()
    unchanged = [torch.equal(a, b) for a, b in zip(*amplify.around, strict=True)]
    assert trainer.state.global_step == 6
    logged = [row for row in trainer.kept_logs if "loss" in row]
    if factor is None:
        assert unchanged.count(False) > 30, "what the model uses has moved"
        assert "spikes/skipped" not in logged[0]
        return
    assert all(unchanged), "AdamW's momentum and weight decay must rest too"
    assert [row["spikes/skipped"] for row in logged] == [0, 0, 0, 1, 1, 1]
    assert logged[3]["grad_norm"] > 20 * logged[2]["grad_norm"], "what is logged is the spike itself"
    (record,) = caplog.records
    assert "step 4: gradient norm" in record.getMessage()
    assert sum(e.id in record.getMessage() for e in encoded) == 8


def test_a_lasting_rise_is_accepted_after_half_a_window() -> None:
    guard = Guard(None, 3.0, spike_window=4)
    skipped = []
    for norm in (1.0, 1.1, 0.9, 1.0, 2.9, 10.0, 10.0, 10.0, 10.0):
        guard._check_spike(norm, 1)
        skipped.append(guard._spike)
    assert skipped == [False] * 5 + [True, True, False, False]
    assert guard.skipped == 2


def test_the_spike_rule_goes_on_after_a_resume(model, encoded, tmp_path) -> None:
    def run(folder, policy, steps, **train):
        guard = Guard(folder, 1.02, spike_window=3)
        trainer = trainer_of(
            policy, encoded, folder, guard=guard, max_steps=8, save_strategy="steps", save_steps=6
        )
        if steps < 8:  # a kill behind the checkpoint
            trainer.add_callback(StopAfter(steps))
        trainer.train(**train)
        return policy, guard, trainer.kept_logs

    whole, guard, logs = run(tmp_path / "a", copy.deepcopy(model), 8)
    run(tmp_path / "b", copy.deepcopy(model), 7)
    checkpoint = str(tmp_path / "b" / "checkpoint-6")
    again, resumed, tail = run(tmp_path / "b", copy.deepcopy(model), 8, resume_from_checkpoint=checkpoint)
    counts = [row["spikes/skipped"] for row in logs if "loss" in row]
    assert 0 < counts[5] < counts[7], "a spike on either side of the checkpoint"
    assert [row["spikes/skipped"] for row in tail if "loss" in row] == counts[6:]
    assert (resumed.norms, resumed.skipped) == (guard.norms, guard.skipped)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_new_start_takes_the_old_report_away(model, encoded, tmp_path) -> None:
    (tmp_path / "nonfinite.json").write_text("{}")
    trainer_of(model, encoded, tmp_path, max_steps=1).train()
    assert not (tmp_path / "nonfinite.json").exists()


def test_the_measured_norm_is_the_clipped_one() -> None:
    layer = torch.nn.Linear(3, 2)
    layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).pow(2).sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    measured = gradient_norm(layer)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, layer.parameters(), strict=True))
    assert float(measured) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)))
    layer.zero_grad()
    assert float(gradient_norm(layer)) == 0


def test_deepspeed_and_the_spike_rule_exclude_each_other(model, encoded, tmp_path, monkeypatch) -> None:
    def as_deepspeed(self) -> None:
        original(self)
        self.is_deepspeed_enabled = True

    original = PreferenceTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(PreferenceTrainer, "create_accelerator_and_postprocess", as_deepspeed)
    with pytest.raises(RecipeError, match=r"train\.spike_factor"):
        trainer_of(model, encoded, tmp_path, guard=Guard(tmp_path, 5.0))
