"""The thin trainer: equal configurations take equal steps, and what is logged is what happened."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from cwdpo.data.encode.collate import collate
from cwdpo.errors import NonFiniteError
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import reference_pass, scored_pairs
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions

OBJECTIVE_SPECS = [
    {"name": "sft"},
    {"name": "sft_constrained", "penalty": 0.5, "constraint": 7.0},
    {"name": "sft_constrained", "penalty": 0.5, "constraint": 0.5},
    {"name": "sft_smoothed", "weight": 0.2},
    {"name": "dpo", "beta": 0.5, "sft_weight": 0.7},
    {"name": "cw_dpo", "beta": 0.5, "floor": -6.0, "tau": 0.5},
    {"name": "cw_dpo", "beta": 0.5, "floor": -6.0, "tau": 0.5, "negative_mask": "differing_span"},
    {"name": "cw_dpo", "beta": 0.5, "floor": -6.0, "tau": 0.5, "cooling": "matched"},
    {"name": "mpo", "beta": 0.5},
    {"name": "ipo", "beta": 0.5},
    {"name": "wpo", "beta": 0.5},
    {"name": "beta_dpo", "beta": 0.5, "alpha": 2.0, "keep": 0.6},
    {"name": "unlikelihood", "weight": 0.5},
    {"name": "simpo"},
]


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        # Plain SGD: Adam would turn rounding noise in tiny gradients into full steps.
        "optim": "sgd",
        "max_grad_norm": 1.0,
        **changes,
    }
    return TrainingArguments(**settings)


@pytest.fixture
def encoded(model, encoder, examples):
    """Rows with one, two and, for one of them, no negative."""
    rows = list(examples[:24])
    rows[3] = replace(rows[3], rejected=rows[3].rejected[:1])
    found, problems = encoder.encode_all(rows, "rejected", require_negative=False)
    assert not problems
    return reference_pass(model, found)


def train(model, encoded, spec, folder, **changes):
    objective = OBJECTIVES.build(spec)
    data = [e for e in encoded if e.negatives or not objective.needs_negatives]
    policy = copy.deepcopy(model)
    logs = []
    options = TrainerOptions(on_log=logs.append)
    trainer = PreferenceTrainer(policy, arguments(folder, **changes), objective, data, options=options)
    trainer.train()
    return policy, logs


@pytest.mark.parametrize("spec", OBJECTIVE_SPECS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_batch_1_with_accumulation_8_equals_batch_8(model, encoded, spec, tmp_path) -> None:
    whole, logs = train(model, encoded, spec, tmp_path / "a")
    split, split_logs = train(
        model, encoded, spec, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    moved = max(
        float((a - b).detach().abs().max())
        for a, b in zip(whole.parameters(), model.parameters(), strict=True)
    )
    assert moved > 1e-4, "nothing was learned, so nothing was compared"
    for (name, a), b in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    for a, b in zip(logs, split_logs, strict=True):
        for key in (
            "loss",
            "grad_norm",
            "logps/chosen",
            "rewards/margins",
            "cooling/weight_mean",
            "loss/nll",
        ):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-4), key


def test_the_loss_of_a_step_is_the_objective_on_its_batch(model, encoded, tmp_path) -> None:
    objective = OBJECTIVES.build({"name": "cw_dpo", "floor": -6.0, "tau": 0.5, "sft_weight": 0.3})
    batch = collate(encoded[:8])
    expected = objective(scored_pairs(batch, plain.score(model, batch))).loss
    _, logs = train(
        model,
        encoded[:8],
        {"name": "cw_dpo", "floor": -6.0, "tau": 0.5, "sft_weight": 0.3},
        tmp_path,
        max_steps=1,
    )
    assert logs[0]["loss"] == pytest.approx(float(expected.detach()), abs=1e-4)


def test_logged_names_are_trls_and_the_coolings(model, encoded, tmp_path) -> None:
    _, logs = train(model, encoded, {"name": "cw_dpo", "floor": -6.0, "tau": 0.5}, tmp_path, max_steps=1)
    expected = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")}
    expected |= {f"{kind}/{side}" for kind in ("logps", "logps_mean") for side in ("chosen", "rejected")}
    expected |= {f"cooling/{x}" for x in ("weight_mean", "weight_p10", "weight_p90", "fraction_cooled")}
    assert expected <= logs[0].keys()
    # logps/* are sums per completion, logps_mean/* per token
    assert logs[0]["logps/chosen"] < logs[0]["logps_mean/chosen"] < 0


def test_metrics_are_means_over_values_not_over_micro_batches(model, encoded, tmp_path) -> None:
    pairs = encoded[:3]
    assert len({len(e.negatives) for e in encoded[:4]}) > 1
    _, logs = train(
        model, encoded[1:4], {"name": "dpo"}, tmp_path, per_device_train_batch_size=1,
        gradient_accumulation_steps=3, max_steps=1, learning_rate=1e-9,
    )  # fmt: skip
    sums = [c.reference_sum_logp for e in encoded[1:4] for c in e.negatives]
    assert logs[0]["logps/rejected"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    assert len(pairs) == 3


def test_a_non_finite_loss_stops_before_the_update_and_names_the_example(model, encoded, tmp_path) -> None:
    bad = encoded[2]
    images = {k: torch.full_like(v, float("nan")) for k, v in bad.prompt.images.items()}
    data = [replace(bad, prompt=replace(bad.prompt, load_images=lambda: images))]
    policy = copy.deepcopy(model)
    trainer = PreferenceTrainer(policy, arguments(tmp_path), OBJECTIVES.build("dpo"), data)
    with pytest.raises(NonFiniteError, match=bad.id):
        trainer.train()
    for a, b in zip(policy.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "spec",
    [{"name": "dpo", "beta": 0.5}, {"name": "beta_dpo", "beta": 0.5, "alpha": 50.0}],
    ids=["dpo", "beta_dpo"],
)
def test_resume_equals_the_uninterrupted_run(model, encoded, tmp_path, spec) -> None:
    settings = {"optim": "adamw_torch", "max_steps": 6, "learning_rate": 1e-4}
    whole, _ = train(model, encoded, spec, tmp_path / "a", **settings)
    folder = tmp_path / "b"
    saving = arguments(folder, **settings, save_strategy="steps", save_steps=3)
    data = [e for e in encoded if e.negatives]
    PreferenceTrainer(copy.deepcopy(model), saving, OBJECTIVES.build(spec), data).train()
    again = copy.deepcopy(model)
    PreferenceTrainer(again, saving, OBJECTIVES.build(spec), data).train(
        resume_from_checkpoint=str(folder / "checkpoint-3")
    )
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
