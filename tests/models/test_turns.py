"""Turns of the processes that call a sharded model, with the answers of the others written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cwdpo.config import ModelSettings
from cwdpo.models import turns
from cwdpo.models.load_sharded import why_not_sharded
from cwdpo.scoring.pairs import reference_pass


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the other process wants in each exchange: 0 for nothing, 1 for text, 2 for images."""
    wants: list[int] = []
    monkeypatch.setattr(turns, "is_sharded", lambda model: True)
    monkeypatch.setattr(turns, "several", lambda: True)
    monkeypatch.setattr(turns, "largest", lambda own, what: max(own, wants.pop(0)))
    return wants


@pytest.fixture
def called(model: Any) -> list[str]:
    """The kinds of calls of the model, in order."""
    found: list[str] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append("image" if kwargs.get("pixel_values") is not None else "text")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return found


def test_a_call_waits_until_the_processes_want_its_kind(model, encoder, examples, others, called) -> None:
    encoded = encoder.encode_all(examples[:2], "rejected", require_negative=True)[0]
    turns.silent_rows_from(model, lambda: (e.prompt for e in encoded))
    wanted = reference_pass(model, encoded, batch_size=1)
    called.clear()
    model.train()
    others += [2, 1, 2, 1, 0]
    with turns.in_turns(model):
        assert reference_pass(model, encoded, batch_size=1) == wanted, "silent rows change nothing"
    # Two calls with images; the other process has one with an image and two of text, of which one comes later.
    assert called == ["image", "image", "image", "text"]
    assert model.training
    assert others == []
    with turns.in_turns(model):
        others += [1, 2, 1, 0, 0]
        turns.take_turn(model, {"input_ids": torch.ones(1, 1), "pixel_values": None})
    assert called[4:] == ["image", "text"]
    turns.take_turn(model, {})  # outside a pass nobody is asked


def test_an_error_lets_the_other_process_finish(model, others, called) -> None:
    others += [1, 1, 0]
    with pytest.raises(ValueError, match="own"), turns.in_turns(model):
        raise ValueError("own")
    assert called == ["text", "text"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tune": "lora"}, None),
        ({"tune": "full"}, None),
        ({"tune": "lora", "quantization": "nf4"}, "model.quantization"),
        ({"tune": "lora", "lora": {"use_dora": True}}, "model.lora.use_dora"),
        ({"tune": "lora", "lora": {"modules_to_save": ["lm_head"]}}, "model.lora.modules_to_save"),
        ({"tune": "full", "lora": {"use_dora": True}}, None),
    ],
)
def test_what_is_loaded_whole(settings: dict[str, Any], reason: str | None) -> None:
    assert why_not_sharded(ModelSettings(**settings)) == reason
