"""Vanilla DPO here equals TRL's loss and parameter gradients on the same batch (fp32)."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from PIL import Image

from cwdpo.data.collate import collate
from cwdpo.data.read import read_examples
from cwdpo.data.rows import rows_source
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


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [(["sigmoid"], {}), (["sigmoid", "sft"], {"sft_weight": 1.0})],
    ids=["dpo", "dpo+sft"],
)
def test_dpo_equals_trl(model, processor, encoder, rows, tmp_path, loss_type, settings) -> None:
    policy = copy.deepcopy(model)
    with torch.no_grad():  # the policy has moved away from the reference
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.003)
    theirs, their_gradients = trl_loss(policy, model, processor, rows, loss_type, tmp_path)

    examples = read_examples(rows_source(rows, "rows")).examples
    encoded, problems = encoder.encode_all(examples, "rejected", require_negative=True)
    assert not problems
    encoded = reference_pass(model, encoded)
    policy.zero_grad()
    batch = collate(encoded)
    objective = OBJECTIVES.build({"name": "dpo", "beta": 0.3, **settings})
    loss = objective(scored_pairs(batch, plain.score(policy, batch))).loss
    loss.backward()
    assert abs(float(loss.detach()) - theirs) < 1e-5
    assert abs(theirs - 0.6931) > 1e-3, "at the reference everything would agree"
    ours = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert ours.keys() == their_gradients.keys()
    scale = max(float(g.abs().max()) for g in their_gradients.values())
    assert scale > 1e-3
    for name, gradient in their_gradients.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5 * max(scale, 1.0)), name


def trl_loss(policy, reference, processor, rows, loss_type, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(
            output_dir=str(tmp_path),
            beta=0.3,
            loss_type=loss_type,
            per_device_train_batch_size=ROWS,
            report_to="none",
            use_cpu=True,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        )
        trainer = DPOTrainer(
            copy.deepcopy(policy),
            ref_model=copy.deepcopy(reference),
            args=args,
            train_dataset=_dataset(rows),
            processing_class=processor,
        )
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
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
