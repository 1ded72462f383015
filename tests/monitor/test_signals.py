"""What the training step and one update say of themselves: gradient shares, one-step influence, copies of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cwdpo.data.encode.collate import collate
from cwdpo.monitor.influence import one_step
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import reference_pass, scored_pairs
from cwdpo.trainer.gradient import gradient_metrics, gradient_sums, pushes
from cwdpo.trainer.weights import Weights


@pytest.fixture
def encoded(model, encoder, examples):
    found = encoder.encode_all(examples[:6], "rejected", require_negative=True)[0]
    return reference_pass(model, found)


def test_the_push_is_the_l1_norm_of_the_loss_by_the_logits(model, encoded) -> None:
    """Against autograd through the logits themselves, for an objective that masks and one that does not."""
    batch = collate(encoded[:3])
    for spec in (
        {"name": "dpo", "beta": 0.5, "sft_weight": 0.3},
        {"name": "dpo", "negative_mask": "differing_span"},
    ):
        objective = OBJECTIVES.build(spec)
        tokens = plain.score(model, batch)
        found = pushes(objective(scored_pairs(batch, tokens)).loss, tokens)
        head = model.get_output_embeddings()
        original, kept = head.forward, []

        def keeping(hidden, original=original, kept=kept):
            out = original(hidden)
            if out.requires_grad:
                out.retain_grad()
                kept.append(out)
            return out

        head.forward = keeping
        again = plain.score(model, batch)
        objective(scored_pairs(batch, again)).loss.backward()
        del head.forward
        model.zero_grad()
        (logits,) = kept
        lengths = [len(c.ids) for c in batch.completions]
        expected = [part.sum() for part in logits.grad.abs().sum(-1).split(lengths)]
        assert found.tolist() == pytest.approx([float(e) for e in expected], rel=1e-4)


def test_gradient_metrics_by_hand(model, encoded) -> None:
    batch = collate(encoded[:2])
    tokens = plain.score(model, batch)
    pairs = scored_pairs(batch, tokens)
    output = OBJECTIVES.build({"name": "dpo", "beta": 1.0})(pairs)
    sums = gradient_sums(batch, tokens, pairs, output)
    found = gradient_metrics(sums)
    push = pushes(output.loss, tokens)
    mine = float(push[batch.rejected].sum())
    assert found["gradient/rejected_share"] == pytest.approx(mine / float(push.sum()))
    logp = tokens.logp.detach()[batch.chosen]
    mask = tokens.mask[batch.chosen]
    assert found["gradient/residual_chosen"] == pytest.approx(float((1 - logp.exp())[mask].mean()), abs=1e-5)
    assert (
        found["gradient/vulnerable"] == found["gradient/saturated"] == 0
    )  # policy is the reference: a = 1/2
    # a = sigmoid(margin): 0.9 lies in the zone, 0.999 is saturated
    margins = torch.tensor([2.2, 7.0] + [0.0] * (len(batch.rejected) - 2))
    moved = replace(output, per_pair={"rewards/margins": margins})
    found = gradient_metrics(gradient_sums(batch, tokens, pairs, moved))
    assert found["gradient/vulnerable"] == pytest.approx(1 / len(margins))
    assert found["gradient/saturated"] == pytest.approx(1 / len(margins))
    assert gradient_metrics({}) == {}


def test_easy_negatives_are_told_by_their_distance_from_chosen(model, encoded) -> None:
    batch = collate(encoded[:2])
    tokens = plain.score(model, batch)
    pairs = scored_pairs(batch, tokens)
    output = OBJECTIVES.build({"name": "dpo"})(pairs)
    chosen = pairs.chosen.mean_logp[pairs.prompt].detach()
    far = chosen - torch.tensor([2.5, *[1.5] * (len(chosen) - 1)])
    rejected = replace(pairs.rejected, sum_logp=far * pairs.rejected.n_tokens)
    found = gradient_metrics(gradient_sums(batch, tokens, replace(pairs, rejected=rejected), output))
    assert found["pairs/easy"] == pytest.approx(1 / len(chosen))
    assert found["pairs/gap"] == pytest.approx((2.5 + 1.5 * (len(chosen) - 1)) / len(chosen), rel=1e-4)
    push = pushes(output.loss, tokens)[batch.rejected]
    assert found["gradient/easy_share"] == pytest.approx(float(push[0] / push.sum()))


def test_one_step_predicts_what_a_real_step_does(model, encoded) -> None:
    objective = OBJECTIVES.build({"name": "dpo", "beta": 0.5})
    observed = collate(encoded[:4])
    kinds = [
        "chosen" if i in set(observed.chosen.tolist()) else "rejected"
        for i in range(len(observed.completions))
    ]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = one_step(model, observed, kinds, [collate([encoded[4]]), collate([encoded[5]])], objective)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert found.predicted.shape == found.actual.shape == (2, len(kinds))
    assert float(found.predicted.abs().max()) == pytest.approx(0.01, rel=1e-4)
    assert found.sign_agreement >= 0.9
    assert found.correlation is not None
    assert found.correlation > 0.99

    # The same step taken for real, by an optimizer.
    def mean_logp() -> torch.Tensor:
        with torch.no_grad():
            scores = plain.score(model, observed)
        return scores.logp.sum(1) / scores.mask.sum(1)

    start = mean_logp()
    batch = collate([encoded[4]])
    objective(scored_pairs(batch, plain.score(model, batch))).loss.backward()
    torch.optim.SGD(model.parameters(), lr=float(found.eta[0])).step()
    assert (mean_logp() - start).tolist() == pytest.approx(found.actual[0].tolist(), abs=2e-5)
    assert torch.isfinite(found.kernel_of("chosen")).all()


def test_weights_go_back_and_survive_a_file(model, tmp_path) -> None:
    kept = Weights.of(model)
    name, parameter = next(iter(model.named_parameters()))
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1)
    with kept.in_force(model):
        assert torch.equal(parameter, original)
    assert torch.equal(parameter, original + 1)
    kept.save(tmp_path / "healthy-0.safetensors")
    Weights.load(tmp_path / "healthy-0.safetensors", model).put_into(model)
    assert torch.equal(dict(model.named_parameters())[name], original)
