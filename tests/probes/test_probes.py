"""Probes by hand arithmetic on a small held-out pass, and against an independent plain computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cwdpo.monitor.influence import OneStep
from cwdpo.monitor.probe_pass import ProbeSet
from cwdpo.objectives.base import Scale
from cwdpo.probes.base import PROBES, HeldOut


@pytest.fixture
def held() -> HeldOut:
    """Two prompts: chosen and one hard negative each, and an easy one for the second."""
    now = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).double().log()
    start = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).double().log()
    return HeldOut(
        kinds=("chosen", "hard", "chosen", "hard", "easy"),
        prompt=torch.tensor([0, 0, 1, 1, 1]),
        sum_logp=torch.tensor([-2.0, -6.0, -3.0, -4.0, -20.0]).double(),
        start_sum_logp=torch.tensor([-3.0, -4.0, -3.0, -5.0, -10.0]).double(),
        n_tokens=torch.tensor([2, 2, 3, 4, 5]),
        entropy=torch.tensor([1.0, 2.0]),
        top1=torch.tensor([0.5, 0.8]),
        correct=torch.tensor([1.0, 0.0]),
        logp=now,
        start_logp=start,
        scale=Scale(floor=-2.0, tau=0.5),
        step=7,
    )


def read(name: str, held: HeldOut) -> dict[str, tuple[float | None, int]]:
    readings = PROBES.build(name)(held)
    assert all(r.step == held.step for r in readings)
    return {r.name: (r.value, r.n) for r in readings}


def test_delta_logp(held) -> None:
    found = read("delta_logp", held)
    assert found["delta_logp/chosen"] == (pytest.approx((1 / 2 + 0 / 3) / 2), 2)
    assert found["delta_logp/hard"] == (pytest.approx((-2 / 2 + 1 / 4) / 2), 2)
    assert found["delta_logp/easy"] == (pytest.approx(-10 / 5), 1)
    assert found["chosen_shift"] == (pytest.approx(0.5), 2)
    assert found["rejected_shift"] == (pytest.approx((-2 + 1 - 10) / 3), 3)
    margins = [1 - -2, 0 - 1, 0 - -10]
    assert found["margin"] == (pytest.approx(sum(margins) / 3), 3)
    assert found["accuracy"] == (pytest.approx(2 / 3), 3)
    assert found["nll"] == (pytest.approx(5 / 5), 5)


def test_cooling(held) -> None:
    found = read("cooling", held)

    def weight(mean_logp: float) -> float:
        return 1 / (1 + math.exp(-(mean_logp + 2.0) / 0.5))

    assert found["cooling/weight/hard"] == (pytest.approx((weight(-3) + weight(-1)) / 2), 2)
    assert found["cooling/weight/easy"] == (pytest.approx(weight(-4)), 1)
    assert read("cooling", replace(held, scale=Scale())) == {}


def test_divergence(held) -> None:
    found = read("divergence", held)
    assert found["tv"] == (pytest.approx((0.25 + 0) / 2), 2)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert found["kl"] == (pytest.approx(kl / 2), 2)
    m = 0.375
    js = (0.5 * math.log(0.5 / m) + 0.25 * math.log(0.25 / m)) / 2
    js += (0.25 * math.log(0.25 / m) + 0.5 * math.log(0.5 / m)) / 2
    assert found["js"] == (pytest.approx(js / 2), 2)
    assert read("divergence", replace(held, logp=None)) == {}


def test_peakedness_and_confidence(held) -> None:
    assert read("peakedness", held) == {
        "entropy": (1.5, 2),
        "top1": (pytest.approx(0.65), 2),
        "argmax_logp": (pytest.approx((math.log(0.5) + math.log(0.8)) / 2), 2),
    }
    # one token a bin: |0.5 - 1| / 2 + |0.8 - 0| / 2
    assert read("confidence", held)["ece"] == (pytest.approx(0.65), 2)
    nothing = torch.empty(0)
    assert read("confidence", replace(held, top1=nothing, correct=nothing))["ece"] == (None, 0)


def test_the_mean_of_nothing_is_missing(held) -> None:
    assert held.reading("x", torch.empty(0), "nats").value is None


def test_a_pass_equals_plain_scores_after_a_change_of_the_policy(model, encoder, examples) -> None:
    from cwdpo.data.encode.collate import collate
    from cwdpo.scoring import plain
    from random_models import distributions

    encoded = encoder.encode_all(examples[:5], "rejected", require_negative=False)[0]

    def apart() -> list[float]:
        return sorted(s for e in encoded for s in plain.score(model, collate([e])).logp.sum(1).tolist())

    probes = ProbeSet(encoded, model, batch_size=2)
    before = apart()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    held = probes.measure(model, step=3)
    assert sorted(held.sum_logp.tolist()) == pytest.approx(apart(), abs=1e-3)
    assert sorted(held.start_sum_logp.tolist()) == pytest.approx(before, abs=1e-3)
    assert held.kinds.count("chosen") == 5
    chosen_tokens = sum(len(e.chosen.ids) for e in encoded)
    assert held.top1.numel() == chosen_tokens
    assert held.logp.shape == (chosen_tokens, model.config.get_text_config().vocab_size)
    assert sorted(held.logp.exp().max(-1).values.tolist()) == pytest.approx(
        sorted(held.top1.tolist()), abs=1e-5
    )
    # the same tokens in the same order, now and at the start
    expected = torch.cat(
        [distributions(model, collate([e.__class__(e.id, e.prompt, e.chosen)])) for e in encoded]
    )
    assert torch.allclose(held.logp, expected, atol=1e-4)


def test_divergence_is_measured_on_as_many_prompts_as_fit(model, encoder, examples, monkeypatch) -> None:
    from cwdpo.monitor import probe_pass as base

    encoded = encoder.encode_all(examples[:4], "rejected", require_negative=False)[0]
    vocabulary = model.config.get_text_config().vocab_size
    two = sum(len(e.chosen.ids) for e in encoded[:2])
    monkeypatch.setattr(base, "MAX_STORED", two * vocabulary)
    held = ProbeSet(encoded, model).measure(model)
    assert held.logp.shape[0] == two
    assert {r.name: r.n for r in PROBES.build("divergence")(held)}["kl"] == two
    monkeypatch.setattr(base, "MAX_STORED", 1)
    assert ProbeSet(encoded, model).measure(model).logp is None


def test_every_probe_reads_and_names_its_unit(held) -> None:
    step = OneStep(
        ("chosen", "hard"), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), torch.ones(2), torch.ones(1)
    )
    held = replace(held, sum_p=held.n_tokens * 0.5, sampled={"on_policy": [("a b", True)]}, one_step=step)
    held = replace(held, sources=("a",) * (int(held.prompt.max()) + 1))
    for name in PROBES.names():
        readings = PROBES.build(name)(held)
        assert readings, name
        assert all(r.unit and r.n >= 0 for r in readings), name
        assert PROBES.get(name).__doc__
