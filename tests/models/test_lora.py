"""Kinds of LoRA by recipe: what is trained, that the start is the base, that scoring, saving and loading are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import Encoder
from cwdpo.errors import ModelError
from cwdpo.models.adapter import idle_adapters_off
from cwdpo.models.load import load_policy
from cwdpo.models.sample import sample
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.scoring import plain
from cwdpo.scoring.score import score

ATTENTION = ("q_proj", "v_proj")
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "projector saved": {"modules_to_save": ("multi_modal_projector",)},
    "ranks by layer": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
}


def settings(folder: Path | str, **lora: Any) -> ModelSettings:
    return ModelSettings(path=str(folder), device="cpu", tune="lora", lora=LoraSettings(r=4, alpha=8, **lora))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_lora(model_folder: Path, examples: Any, tmp_path: Path, kind: str) -> None:
    base = load_policy(ModelSettings(path=str(model_folder), device="cpu"))
    policy = load_policy(settings(model_folder, target_modules=ATTENTION, **KINDS[kind]))
    encoder = Encoder(policy.processor)
    batch = collate(encoder.encode_all(examples[:3], "rejected", require_negative=True)[0])
    with torch.no_grad():
        torch.testing.assert_close(
            score(policy.model, batch).logp, score(base.model, batch).logp, atol=1e-5, rtol=0
        )
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        moved, slow = score(policy.model, batch).logp, plain.score(policy.model, batch).logp
    assert float((moved - score(base.model, batch).logp.detach()).abs().max()) > 0.01
    torch.testing.assert_close(moved, slow, atol=1e-5, rtol=0)
    policy.model.save_pretrained(tmp_path / "adapter")
    policy.processor.save_pretrained(tmp_path / "adapter")
    again = load_policy(ModelSettings(path=str(tmp_path / "adapter"), device="cpu", tune="lora"))
    with torch.no_grad():
        torch.testing.assert_close(score(again.model, batch).logp, moved, atol=1e-6, rtol=0)
    trained = [n for n, p in again.model.named_parameters() if p.requires_grad]
    assert any("lora_magnitude_vector" in n for n in trained) == (kind == "dora")
    ranks = {
        n: p.shape[0] for n, p in policy.model.named_parameters() if "language_model" in n and "lora_A" in n
    }
    assert set(ranks.values()) == ({2, 4} if kind == "ranks by layer" else {4})
    assert any("modules_to_save" in n for n in trained) == (kind == "projector saved")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"use_dora": True}, "model.lora.use_dora = True, but the adapter that is trained further"),
        ({"use_rslora": True}, "model.lora.use_rslora = True, but the adapter"),
        ({"rank_pattern": {"q_proj": 2}}, "model.lora.rank_pattern"),
        ({"modules_to_save": ("lm_head",)}, "model.lora.modules_to_save"),
        ({"init_lora_weights": "gaussian"}, "model.lora.init_lora_weights is of a new adapter"),
    ],
)
def test_an_adapter_that_is_trained_further_keeps_its_kind(
    model_folder: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    policy = load_policy(settings(model_folder, target_modules=ATTENTION))
    policy.model.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        load_policy(settings(tmp_path, **asked))
    assert message in str(error.value)


def test_a_module_that_is_frozen_cannot_be_saved(model_folder: Path) -> None:
    both = settings(model_folder, target_modules=ATTENTION, modules_to_save=("multi_modal_projector",))
    with pytest.raises(ModelError, match=r"model\.lora\.modules_to_save: multi_modal_projector is frozen"):
        load_policy(both.model_copy(update={"freeze": ("projector",)}))


@pytest.mark.parametrize("kind", [*KINDS, "frozen vision"])
def test_adapters_that_add_nothing_are_skipped_without_a_trace(
    model_folder: Path, examples: Any, kind: str
) -> None:
    asked = settings(model_folder, **KINDS.get(kind, {}))
    if kind == "frozen vision":
        asked = asked.model_copy(update={"freeze": ("vision", "projector")})
    model = load_policy(asked).model.eval()
    encoder = Encoder(load_policy(asked).processor)
    batch = collate(encoder.encode_all(examples[:3], "rejected", require_negative=True)[0])
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}

    def skipped() -> set[bool]:
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
        return {layer.disable_adapters for layer in layers}

    with torch.no_grad():
        wanted = score(model, batch).logp
        with idle_adapters_off(model):
            assert skipped() == {kind != "dora"}
            assert torch.equal(score(model, batch).logp, wanted)
            sampled = sample(model, encoder, examples[:2], max_new_tokens=5)
        assert skipped() == {False}
        assert sample(model, encoder, examples[:2], max_new_tokens=5) == sampled
        layers[-1].lora_B["default"].weight[0, 0] = 0.5
        moved = score(model, batch).logp
        with idle_adapters_off(model):
            assert skipped() == {False}, "one that changes something keeps all"
            assert torch.equal(score(model, batch).logp, moved)
        assert not torch.equal(moved, wanted)
