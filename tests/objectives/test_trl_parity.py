"""Objectives that TRL has too equal its losses and parameter gradients on the same batch (fp32)."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cwdpo.data.encode.collate import collate
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import reference_pass, scored_pairs

ROWS = 4


@pytest.fixture
def rows(world_folder):
    import json

    lines = (world_folder / "train.jsonl").read_text().splitlines()
    made = []
    for line in lines:
        row = json.loads(line)
        if len(made) < ROWS:
            image = Image.open(world_folder / row["images"][0]).convert("RGB")
            made.append({k: row[k] for k in ("prompt", "chosen", "rejected")} | {"images": [image]})
    return made


CASES = {
    "dpo": ({"loss_type": ["sigmoid"]}, {"name": "dpo"}),
    "dpo+sft": ({"loss_type": ["sigmoid", "sft"]}, {"name": "dpo", "sft_weight": 1.0}),
    "ipo": ({"loss_type": ["ipo"]}, {"name": "ipo"}),
    "robust": (
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"name": "robust_dpo", "label_smoothing": 0.2},
    ),
    "hinge": ({"loss_type": ["hinge"]}, {"name": "hinge"}),
    "mpo": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"name": "mpo", "reward_shift": False},
    ),
    "wpo": ({"loss_type": ["sigmoid"], "use_weighting": True}, {"name": "wpo"}),
}


@pytest.mark.parametrize(("theirs", "ours"), CASES.values(), ids=CASES)
def test_the_loss_and_its_gradients_equal_trls(
    model, processor, encoder, rows, tmp_path, theirs, ours
) -> None:
    policy = moved(model)
    expected, their_gradients = trl_loss(policy, model, processor, rows, theirs, tmp_path)
    batch = encoded_batch(model, encoder, rows)
    objective = OBJECTIVES.build({"beta": 0.3, **ours})
    policy.zero_grad()
    tokens = plain.score(policy, batch, stats=objective.token_stats)
    loss = objective(scored_pairs(batch, tokens)).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert found.keys() == their_gradients.keys()
    scale = max(float(g.abs().max()) for g in their_gradients.values())
    assert scale > 1e-4
    for name, gradient in their_gradients.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * max(scale, 1.0)), name


def test_cdpo_equals_trls_label_smoothing(model, processor, encoder, rows, tmp_path) -> None:
    """TRL smooths labels in its loss ``aot``, which for a single pair is cDPO."""
    policy = moved(model)
    settings = {"loss_type": ["aot"], "label_smoothing": 0.2}
    for row in rows[:2]:
        expected, _ = trl_loss(policy, model, processor, [row], settings, tmp_path)
        batch = encoded_batch(model, encoder, [row])
        objective = OBJECTIVES.build({"name": "cdpo", "beta": 0.3, "label_smoothing": 0.2})
        loss = objective(scored_pairs(batch, plain.score(policy, batch))).loss
        # Of one pair nothing averages out: fp32 resolves sums of about 90 nats to 8e-6.
        assert float(loss.detach()) == pytest.approx(expected, abs=3e-6)


def test_simpo_equals_trls(model, encoder, rows) -> None:
    """TRL keeps SimPO in its CPO trainer; its loss takes log-likelihoods per token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
    stub = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    batch = encoded_batch(model, encoder, rows)
    pairs = scored_pairs(batch, plain.score(moved(model), batch))
    losses, chosen, rejected = CPOTrainer.cpo_loss(stub, pairs.chosen.mean_logp, pairs.rejected.mean_logp)
    output = OBJECTIVES.build({"name": "simpo", "beta": 2.0, "gamma": 0.7})(pairs)
    assert float(output.loss.detach()) == pytest.approx(float(losses.mean().detach()), abs=1e-6)
    torch.testing.assert_close(output.per_pair["rewards/chosen"], chosen.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.per_pair["rewards/rejected"], rejected.detach(), atol=1e-6, rtol=1e-6)


def moved(model):
    """A policy that has moved away from the reference: there, all losses would agree."""
    policy = copy.deepcopy(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.003)
    return policy


def encoded_batch(reference, encoder, rows):
    examples = read_examples(rows_source(rows, "rows")).examples
    encoded, problems = encoder.encode_all(examples, "rejected", require_negative=True)
    assert not problems
    return collate(reference_pass(reference, encoded))


def trl_loss(policy, reference, processor, rows, settings, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(
            output_dir=str(tmp_path),
            beta=0.3,
            per_device_train_batch_size=len(rows),
            report_to="none",
            use_cpu=True,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            **settings,
        )
        trainer = DPOTrainer(
            copy.deepcopy(policy),
            ref_model=copy.deepcopy(reference),
            args=args,
            train_dataset=_dataset(rows),
            processing_class=processor,
        )
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def _dataset(rows):
    """TRL wants a Dataset whose images are decoded by the Image feature."""
    from datasets import Dataset, Features, Image, List, Value

    message = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]
    features = Features({"prompt": message, "chosen": message, "rejected": message, "images": List(Image())})

    def full(turns):
        return [
            {"role": t["role"], "content": [{"type": c["type"], "text": c.get("text")} for c in t["content"]]}
            for t in turns
        ]

    data = [
        {**{k: full(r[k]) for k in ("prompt", "chosen", "rejected")}, "images": r["images"]} for r in rows
    ]
    return Dataset.from_list(data, features=features)
