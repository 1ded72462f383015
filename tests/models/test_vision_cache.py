"""Image features of a frozen vision side: kept, equal to the model's own, within their budget."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from cwdpo.data.encode.collate import collate
from cwdpo.models import vision_cache
from cwdpo.models.load import freeze
from cwdpo.models.shared_attention import use_scoring
from cwdpo.models.vision_cache import (
    forget_vision_features,
    keep_vision_features,
    share_vision_features,
)
from cwdpo.scoring.score import score
from random_models import FAMILIES, build, ragged


def frozen(name: str):
    model = build(name)
    for parameter_name, parameter in model.named_parameters():
        inside = any(part in parameter_name for part in ("language_model", "text_model", "lm_head"))
        parameter.requires_grad_(inside)
    return model


def calls_of(model, monkeypatch) -> list[int]:
    seen: list[int] = []
    original = model.get_image_features

    @functools.wraps(original)
    def counted(**inputs):
        seen.append(len(inputs["pixel_values"]))
        return original(**inputs)

    monkeypatch.setattr(model, "get_image_features", counted)
    return seen


@pytest.mark.parametrize("scoring", ["plain", "shared_prefix"])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_computed_once_and_change_nothing(name, scoring, monkeypatch) -> None:
    model = frozen(name)
    batch = collate(ragged(name, model, 2))
    use_scoring(model, scoring)
    wanted = score(model, batch).logp
    wanted.sum().backward()
    gradient = model.get_output_embeddings().weight.grad.clone()
    assert keep_vision_features(model, 1.0)
    seen = calls_of(model, monkeypatch)
    model.zero_grad()
    first = score(model, batch).logp
    first.sum().backward()
    assert torch.allclose(first, wanted, atol=1e-5)
    assert torch.allclose(model.get_output_embeddings().weight.grad, gradient, atol=1e-5)
    assert torch.equal(score(model, batch).logp, first)
    assert len(seen) == 2, "two prompts have pictures, and each is asked once"


def test_what_does_not_fit_is_computed_again_and_stays_the_same(monkeypatch) -> None:
    model = frozen("llava")
    batch = collate(ragged("llava", model, 2))
    keep_vision_features(model, 1.0)
    with torch.no_grad():
        roomy = score(model, batch).logp
    keep_vision_features(model, 1.5 * 16 * 64 * 4 / 2**30)  # one picture's features and a half
    seen = calls_of(model, monkeypatch)
    with torch.no_grad():
        assert torch.equal(score(model, batch).logp, roomy)
        assert len(seen) == 2
        assert torch.equal(score(model, batch).logp, roomy)
    assert len(seen) == 3, "the first picture fits, the pair of pictures does not"


def test_it_is_off_where_the_vision_side_is_trained(caplog) -> None:
    model = build("llava")
    freeze(model, ("vision",))
    with caplog.at_level(logging.INFO, logger="cwdpo"):
        assert not keep_vision_features(model, 1.0)
    assert "multi_modal_projector" in caplog.text
    freeze(model, ("projector",))
    assert keep_vision_features(model, 1.0)
    assert not keep_vision_features(model, 0.0)


def test_it_can_be_switched_off_for_sharded_models(monkeypatch) -> None:
    model = frozen("llava")
    assert keep_vision_features(model, 1.0)
    forget_vision_features(model)
    seen = calls_of(model, monkeypatch)
    with torch.no_grad():
        score(model, collate(ragged("llava", model)))
    assert not seen
    assert model not in vision_cache._CACHES


def test_models_with_the_same_tower_share_features_and_others_do_not(monkeypatch) -> None:
    one, same, other = (frozen("llava") for _ in range(3))
    same.load_state_dict(one.state_dict())
    batch = collate(ragged("llava", one, 2))
    shared: dict[str, object] = {}
    share_vision_features(one, shared)
    assert not shared, "it keeps no features"
    for model in (one, same, other):
        assert keep_vision_features(model, 1.0)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "vision" in n).add_(1.0)
        for name, parameter in same.named_parameters():
            if "language_model" in name:
                parameter.add_(0.01)  # a policy that was trained further
    wanted = score(same, batch).logp
    assert keep_vision_features(same, 1.0)
    share_vision_features(one, shared)
    seen = {id(model): calls_of(model, monkeypatch) for model in (one, same, other)}
    score(one, batch)
    share_vision_features(same, shared)
    assert torch.equal(score(same, batch).logp, wanted)
    assert (len(seen[id(one)]), len(seen[id(same)])) == (2, 0)
    share_vision_features(other, shared)
    score(other, batch)
    assert len(seen[id(other)]) == 2, "another tower, so others' features are not its own"
