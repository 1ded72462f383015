"""Micro-batches by length and by tokens."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from cwdpo.errors import DataError
from cwdpo.models.shared_attention import use_scoring
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.scoring.pairs import reference_pass
from cwdpo.trainer.batching import LengthGrouped, TokenBatches, row_lengths
from cwdpo.trainer.trainer import PreferenceTrainer, TrainerOptions


def lengths_of(n: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(10, 200) for _ in range(n)]


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return 1 - sum(lengths) / padded


def cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("rows", [1, 7, 64, 1003])
def test_every_row_once_an_epoch_and_little_padding(rows: int) -> None:
    lengths = lengths_of(rows)
    sampler = LengthGrouped(lengths.__getitem__, rows, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(rows))
    assert list(sampler) == first, "the same epoch is the same"
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(rows))
    if rows > 100:
        assert second != first
        assert padding(cut(first, 8), lengths) < 0.1 < padding(cut(list(range(rows)), 8), lengths)
        means = [sum(lengths[i] for i in b) / len(b) for b in cut(first, 8)]
        rising = sum(a < b for a, b in itertools.pairwise(means)) / (len(means) - 1)
        assert 0.3 < rising < 0.7, "batches come in random order, not from short to long"


@given(
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 60)), min_size=1, max_size=60),
    most=st.integers(180, 400),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_token_batches(lengths: list[tuple[int, int]], most: int, processes: int, epoch: int) -> None:
    batches = TokenBatches(lengths, most, seed=1, processes=processes)
    batches.set_epoch(epoch)
    found = list(batches)
    assert sorted(i for b in found for i in b) == list(range(len(lengths)))
    assert len(found) == len(batches)
    assert len(found) % processes == 0
    for batch in filter(None, found):
        assert sum(lengths[i][0] for i in batch) * max(lengths[i][1] for i in batch) <= most
    assert list(batches) == found


def test_an_example_longer_than_a_batch_is_named() -> None:
    with pytest.raises(DataError, match=r"max_tokens_per_batch = 50: 1 of 2 .*number 1\) has 60 tokens"):
        TokenBatches([(1, 20), (2, 30)], 50, seed=0)


# --- in the trainer -----------------------------------------------------------------------------------------


def trainer_of(model: Any, data: Any, folder: Any, **changes: Any) -> PreferenceTrainer:
    own = {k: changes.pop(k) for k in ("max_tokens_per_batch", "group_by_length") if k in changes}
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 2,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant", **changes,
    }  # fmt: skip
    objective = OBJECTIVES.build({"name": "cw_dpo", "floor": -6.0, "tau": 0.5})
    options = TrainerOptions(**own)
    return PreferenceTrainer(model, TrainingArguments(**settings), objective, data, options=options)


@pytest.fixture
def encoded(model: Any, encoder: Any, examples: Any) -> Any:
    return reference_pass(model, encoder.encode_all(examples[:14], "rejected", require_negative=True)[0])


@pytest.mark.parametrize("scoring", ["plain", "shared_prefix"])
def test_micro_batches_stay_within_their_tokens(
    model: Any, encoded: Any, scoring: Any, tmp_path: Any
) -> None:
    shared = use_scoring(model, scoring)
    most = 3 * max(rows * longest for rows, longest in (row_lengths(e, shared=shared) for e in encoded))
    trainer = trainer_of(model, encoded, tmp_path, max_tokens_per_batch=most)
    ran: list[int] = []
    seen: list[str] = []
    text = model.model.language_model
    text.register_forward_hook(
        lambda m, a, k, o: ran.append(o.last_hidden_state[..., 0].numel()), with_kwargs=True
    )
    original = trainer.compute_loss
    trainer.compute_loss = lambda m, inputs, **k: (
        seen.extend(inputs["batch"].example_ids),
        original(m, inputs, **k),
    )[1]
    trainer.train()
    assert max(ran) <= most
    assert len(set(ran)) > 1
    assert sorted(seen) == sorted([e.id for e in encoded] * 2), "every row once an epoch"
    logged = [row["tokens/padding"] for row in trainer.state.log_history if "tokens/padding" in row]
    assert len(logged) == trainer.state.global_step
    assert min(logged) < 0.12, "three rows of like length need little padding"


@pytest.mark.parametrize("own", [{"max_tokens_per_batch": 400}, {}], ids=["tokens", "rows"])
@pytest.mark.parametrize("kill_at", [1, 5])
def test_a_resumed_run_takes_the_same_steps(
    model: Any, encoded: Any, own: Any, kill_at: int, tmp_path: Any
) -> None:
    whole = copy.deepcopy(model)
    trainer = trainer_of(whole, encoded, tmp_path / "whole", **own)
    trainer.train()
    assert trainer.state.global_step > 6
    part = copy.deepcopy(model)
    trainer_of(part, encoded, tmp_path / "part", max_steps=kill_at, **own).train()
    rest = copy.deepcopy(model)
    again = trainer_of(rest, encoded, tmp_path / "part", **own)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{kill_at}"))
    for (name, a), b in zip(whole.named_parameters(), rest.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
