"""The rivals' losses by hand arithmetic: python's ``math`` on the batch of test_objectives, never the code itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.config import parse_recipe
from cwdpo.errors import DataError
from cwdpo.objectives.base import OBJECTIVES, Scored, ScoredPairs, StepTotals
from cwdpo.rundir import RunDir
from cwdpo.scoring.token_stats import DETAILS
from cwdpo.stage.splits import prepare_data

# Three prompts; the first has two negatives, the second one, the third none.
CHOSEN, CHOSEN_TOKENS, CHOSEN_REFERENCE = [-3.0, -4.5, -2.0], [4, 5, 2], [-3.5, -4.0, -2.5]
REJECTED, REJECTED_TOKENS, REJECTED_REFERENCE = [-6.0, -9.0, -5.0], [4, 3, 5], [-5.0, -7.0, -5.5]
COLLISION_CHOSEN, COLLISION_REJECTED = [-2.0, -4.0, -1.0], [-4.0, -6.0, -3.5]
REWARD = [-1.0, 2.5, 0.4]
PROMPT = [0, 0, 1]
MARGINS = [0.5 - -1.0, 0.5 - -2.0, -0.5 - 0.5]
BETA = 0.4


def vector(values: list[float], *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def make(**rejected: object) -> ScoredPairs:
    chosen = Scored(
        vector(CHOSEN, grad=True), torch.tensor(CHOSEN_TOKENS), vector(CHOSEN_REFERENCE),
        stats={"collision": vector(COLLISION_CHOSEN)},
    )  # fmt: skip
    side = Scored(
        vector(REJECTED, grad=True), torch.tensor(REJECTED_TOKENS), vector(REJECTED_REFERENCE),
        stats={"collision": vector(COLLISION_REJECTED)}, reward_margin=vector(REWARD),
    )  # fmt: skip
    return ScoredPairs(chosen, replace(side, **rejected), torch.tensor(PROMPT))


def nls(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def over_prompts(first: float, second: float, third: float) -> float:
    return ((first + second) / 2 + third) / 2  # the third prompt has no pair and does not count


def loss(spec: dict, pairs: ScoredPairs | None = None) -> float:
    return float(OBJECTIVES.build(spec)(pairs or make()).loss.detach())


def test_ipo() -> None:
    target = 1 / (2 * BETA)
    per_token = [0.5 / 4 - -1.0 / 4, 0.5 / 4 - -2.0 / 3, -0.5 / 5 - 0.5 / 5]
    assert loss({"name": "ipo", "beta": BETA}) == pytest.approx(
        over_prompts(*((h - target) ** 2 for h in per_token)), rel=1e-12
    )
    assert loss({"name": "ipo", "beta": BETA, "per_token": False}) == pytest.approx(
        over_prompts(*((m - target) ** 2 for m in MARGINS)), rel=1e-12
    )


def test_cdpo_and_robust_dpo() -> None:
    e = 0.2
    z = [BETA * m for m in MARGINS]
    conservative = over_prompts(*((1 - e) * nls(x) + e * nls(-x) for x in z))
    unbiased = over_prompts(*(((1 - e) * nls(x) - e * nls(-x)) / (1 - 2 * e) for x in z))
    assert loss({"name": "cdpo", "beta": BETA, "label_smoothing": e}) == pytest.approx(
        conservative, rel=1e-12
    )
    assert loss({"name": "robust_dpo", "beta": BETA, "label_smoothing": e}) == pytest.approx(
        unbiased, rel=1e-12
    )
    dpo = loss({"name": "dpo", "beta": BETA})
    for name in ("cdpo", "robust_dpo"):
        assert loss({"name": name, "beta": BETA, "label_smoothing": 0}) == pytest.approx(dpo, rel=1e-12)
    # What robust DPO is for: over flipped labels its mean is DPO's loss of the clean ones.
    for x in z:
        clean = ((1 - e) * nls(x) - e * nls(-x)) / (1 - 2 * e)
        flipped = ((1 - e) * nls(-x) - e * nls(x)) / (1 - 2 * e)
        assert (1 - e) * clean + e * flipped == pytest.approx(nls(x), rel=1e-12)


def test_dpop_pays_only_where_chosen_fell() -> None:
    wanted = over_prompts(nls(BETA * 1.5), nls(BETA * 2.5), nls(BETA * (-1.0 - 3.0 * 0.5)))
    assert loss({"name": "dpop", "beta": BETA, "penalty": 3.0}) == pytest.approx(wanted, rel=1e-12)
    pairs = make()
    output = OBJECTIVES.build({"name": "dpop", "beta": BETA, "penalty": 3.0})(pairs)
    (gradient,) = torch.autograd.grad(output.loss, [pairs.chosen.sum_logp])
    pull = -BETA * (1 - sigmoid(BETA * (-1.0 - 1.5))) / 2
    assert gradient[1].item() == pytest.approx(pull * (1 + 3.0), rel=1e-12)


def test_hinge_is_silent_beyond_its_margin() -> None:
    wanted = over_prompts(1 - 0.5 * 1.5, 0, 1 + 0.5 * 1.0)
    pairs = make()
    output = OBJECTIVES.build({"name": "hinge", "beta": 0.5})(pairs)
    assert float(output.loss.detach()) == pytest.approx(wanted, rel=1e-12)
    (gradient,) = torch.autograd.grad(output.loss, [pairs.rejected.sum_logp])
    assert gradient.tolist() == pytest.approx([0.5 / 4, 0.0, 0.5 / 2])


def test_simpo_needs_no_reference() -> None:
    def reward(x: float, n: int) -> float:
        return 2.0 * x / n

    wanted = over_prompts(
        nls(reward(-3.0, 4) - reward(-6.0, 4) - 0.7),
        nls(reward(-3.0, 4) - reward(-9.0, 3) - 0.7),
        nls(reward(-4.5, 5) - reward(-5.0, 5) - 0.7),
    )
    pairs = make()
    bare = ScoredPairs(
        replace(pairs.chosen, reference_sum_logp=None),
        replace(pairs.rejected, reference_sum_logp=None),
        pairs.prompt,
    )
    assert loss({"name": "simpo", "beta": 2.0, "gamma": 0.7}, bare) == pytest.approx(wanted, rel=1e-12)
    assert not OBJECTIVES.get("simpo").needs_reference


def test_wpo_weighs_by_what_the_policy_would_write() -> None:
    weight = [math.exp((-3.0 + 2.0) / 4), math.exp((-4.5 + 4.0) / 5)]
    rejected = [math.exp((-6.0 + 4.0) / 4), math.exp((-9.0 + 6.0) / 3), math.exp((-5.0 + 3.5) / 5)]
    terms = [
        weight[0] * rejected[0] * nls(BETA * 1.5),
        weight[0] * rejected[1] * nls(BETA * 2.5),
        weight[1] * rejected[2] * nls(BETA * -1.0),
    ]
    pairs = make()
    output = OBJECTIVES.build({"name": "wpo", "beta": BETA})(pairs)
    assert float(output.loss.detach()) == pytest.approx(over_prompts(*terms), rel=1e-12)
    (gradient,) = torch.autograd.grad(output.loss, [pairs.rejected.sum_logp])
    wanted = weight[1] * rejected[2] * BETA * (1 - sigmoid(BETA * -1.0)) / 2
    assert gradient[2].item() == pytest.approx(wanted, rel=1e-12), "the weight carries no gradient"


def test_a_uniform_policy_agrees_with_itself_once_in_v() -> None:
    """log of the sum over V of p^2 is -log V for a uniform distribution; a drawn token then weighs exactly 1."""
    from cwdpo.objectives.wpo import alignment

    uniform = Scored(
        vector([-3 * math.log(7)]), torch.tensor([3]), stats={"collision": vector([-3 * math.log(7)])}
    )
    assert alignment(uniform).tolist() == pytest.approx([1.0])


def test_beta_dpo_follows_the_steps_margin_and_leaves_the_unusual_out() -> None:
    spec = {"name": "beta_dpo", "beta": BETA, "alpha": 0.5, "keep": 0.6}
    mean = sum(MARGINS) / 3
    beta = BETA * (1 + 0.5 * (BETA * mean - BETA * 0.2))
    # |M - M0| is 1.3, 2.3, 1.2 nats: two of three pairs stay, the second goes.
    totals = StepTotals(2, 11, 12, ahead=tuple(MARGINS), memory=(0.2,))
    pairs = replace(make(), totals=totals)
    wanted = over_prompts(nls(beta * 1.5), 0.0, nls(beta * -1.0)) / (2 / 3)
    output = OBJECTIVES.build(spec)(pairs)
    assert float(output.loss.detach()) == pytest.approx(wanted, rel=1e-12)
    assert output.per_pair["beta_dpo/kept"].tolist() == [1, 0, 1]
    assert output.per_pair["beta_dpo/beta"].tolist() == pytest.approx([beta] * 3)
    plain = loss({"name": "beta_dpo", "beta": BETA, "alpha": 0, "keep": 1})
    assert plain == pytest.approx(loss({"name": "dpo", "beta": BETA}), rel=1e-12)
    hopeless = replace(make(), totals=StepTotals(2, 11, 12, ahead=(-1e4, -1e4, -1e4)))
    assert OBJECTIVES.build(spec)(hopeless).per_pair["beta_dpo/beta"].tolist() == [1e-3] * 3, "never negative"


MADPO_OFFICIAL = {-3.0: 0.06, -1.0: 0.45, 0.0: 1.00, 1.0: 1.20, 4.0: 1.02}
"""h -> w of the official code at its defaults, to two digits."""


@pytest.mark.parametrize(("h", "wanted"), MADPO_OFFICIAL.items())
def test_madpo_has_the_official_weights(h: float, wanted: float) -> None:
    pairs = make(reward_margin=vector([h, h, h]))
    weight = OBJECTIVES.build("madpo")(pairs).per_pair["madpo/weight"]
    assert weight.tolist() == pytest.approx([wanted] * 3, abs=0.005)


def test_madpo_by_hand() -> None:
    def w(h: float) -> float:
        c = 0.5 + 1.5 / (1 + (1.0 / 0.5) * math.exp(abs(h) - math.log(999)))
        return sigmoid(c * h) / sigmoid(h)

    wanted = over_prompts(*(w(h) * nls(BETA * m) for h, m in zip(REWARD, MARGINS, strict=True)))
    assert loss({"name": "madpo", "beta": BETA}) == pytest.approx(wanted, rel=1e-12)
    far = OBJECTIVES.build("madpo")(make(reward_margin=vector([-7.0, -800.0, 800.0])))
    assert far.per_pair["madpo/weight"].tolist() == pytest.approx([1.0, 1.0, 1.0]), "1 far from 0"
    with pytest.raises(DataError, match=r"reward_margin: write the margins first, with .cwdpo margins"):
        loss({"name": "madpo"}, make(reward_margin=None))


def test_madpo_stands_still_where_the_margin_is_c_times_h() -> None:
    """The weighted loss of a pair and of its mirror image, each as often as the reward model says, has no gradient."""
    for h in (-1.5, 0.7, 3.0):
        c = 0.5 + 1.5 / (1 + 2.0 * math.exp(abs(h) - math.log(999)))
        m = torch.tensor([c * h / 0.1], dtype=torch.float64, requires_grad=True)
        losses = []
        for sign in (1.0, -1.0):
            chosen = Scored(sign * m, torch.tensor([4]), torch.zeros(1, dtype=torch.float64))
            zero = torch.zeros(1, dtype=torch.float64)
            rejected = Scored(zero, torch.tensor([4]), zero, reward_margin=torch.tensor([sign * h]).double())
            output = OBJECTIVES.build("madpo")(ScoredPairs(chosen, rejected, torch.tensor([0])))
            losses.append(sigmoid(sign * h) * output.loss)
        (gradient,) = torch.autograd.grad(losses[0] + losses[1], [m])
        assert gradient.item() == pytest.approx(0.0, abs=1e-9)


def uni_dpo_by_hand(eta: float, gamma: float, nll_weight: float) -> float:
    """The official code with log-probabilities per token, averaged over a prompt's pairs and then over prompts."""

    def pair(i: int) -> float:
        p = PROMPT[i]
        chosen, known = CHOSEN[p] / CHOSEN_TOKENS[p], CHOSEN_REFERENCE[p] / CHOSEN_TOKENS[p]
        rejected, before = REJECTED[i] / REJECTED_TOKENS[i], REJECTED_REFERENCE[i] / REJECTED_TOKENS[i]
        quality = sigmoid(eta * REWARD[i])
        performance = (1 - sigmoid(BETA * (chosen - rejected) - 2.0)) ** gamma
        preference = quality * performance * nls(BETA * (chosen - rejected - (known - before)))
        return preference - nll_weight * (chosen if known > chosen else 0.0)

    return over_prompts(*map(pair, range(3)))


@pytest.mark.parametrize(
    ("eta", "gamma", "nll_weight"), [(0.7, 3.0, 0.001), (0.0, 3.0, 0.5), (1.5, 0.0, 0.0)]
)
def test_uni_dpo_by_hand(eta: float, gamma: float, nll_weight: float) -> None:
    spec = {"name": "uni_dpo", "beta": BETA, "eta": eta, "gamma": gamma, "nll_weight": nll_weight}
    assert loss(spec) == pytest.approx(uni_dpo_by_hand(eta, gamma, nll_weight), rel=1e-12)


def test_uni_dpo_needs_scores_unless_eta_is_0() -> None:
    with pytest.raises(DataError, match=r"uni_dpo: .*score_chosen and score_rejected, or set eta: 0"):
        loss({"name": "uni_dpo"}, make(reward_margin=None))
    plain = {"name": "uni_dpo", "eta": 0.0, "gamma": 0.0, "nll_weight": 0.0, "beta": BETA}
    per_token = [0.5 / 4 - -1.0 / 4, 0.5 / 4 - -2.0 / 3, -0.5 / 5 - 0.5 / 5]
    wanted = over_prompts(*(0.5 * nls(BETA * m) for m in per_token))
    assert loss(plain, make(reward_margin=None)) == pytest.approx(wanted, rel=1e-12)


def test_the_performance_weight_of_uni_dpo_carries_a_gradient() -> None:
    pairs = make()
    given = {"name": "uni_dpo", "beta": BETA, "nll_weight": 0.0}
    (gradient,) = torch.autograd.grad(OBJECTIVES.build(given)(pairs).loss, [pairs.rejected.sum_logp])
    step = 1e-6
    moved = replace(pairs.rejected, sum_logp=vector([REJECTED[0], REJECTED[1], REJECTED[2] + step]))
    slope = (loss(given, replace(pairs, rejected=moved)) - loss(given, pairs)) / step
    assert gradient[2].item() == pytest.approx(slope, rel=1e-4)


def test_mpo_by_hand() -> None:
    spec = {
        "name": "mpo",
        "beta": BETA,
        "preference_weight": 0.7,
        "quality_weight": 0.3,
        "generation_weight": 0.5,
    }
    chosen, rejected = [0.5, 0.5, -0.5], [-1.0, -2.0, 0.5]
    nll = (3.0 + 4.5 + 2.0) / 11

    def wanted(delta: float) -> float:
        pairs = zip(chosen, rejected, strict=True)
        return 0.5 * nll + over_prompts(*(
            0.7 * nls(BETA * (c - r)) + 0.3 * (nls(BETA * c - delta) + nls(delta - BETA * r)) for c, r in pairs
        ))  # fmt: skip

    mean = BETA * sum(chosen + rejected) / 6
    assert loss(spec) == pytest.approx(wanted(mean), rel=1e-12), "the first step's own rewards"
    assert loss({**spec, "reward_shift": False}) == pytest.approx(wanted(0.0), rel=1e-12)
    later = replace(make(), totals=StepTotals(2, 11, 12, ahead=(0.2, 0.4), memory=(0.9, 2.0)))
    assert loss(spec, later) == pytest.approx(wanted((2 * 0.9 + 0.3) / 3), rel=1e-12)


def test_unlikelihood_by_hand() -> None:
    logp = torch.tensor(
        [[-0.1, -2.0, -0.5, -3.4], [-4.0, -2.0, -3.0, 0.0], [-1.0, -1.0, -1.5, -1.5]], dtype=torch.float64
    ).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    span = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)
    tokens = torch.tensor([4, 3, 4])
    pairs = make(token_logp=logp, token_mask=mask, token_span=span, n_tokens=tokens)
    nll = (3.0 + 4.5 + 2.0) / 11

    def punished(cells: torch.Tensor) -> float:
        values = logp.detach()[cells].tolist()
        return sum(-math.log(1 - math.exp(v)) for v in values) / 11

    assert loss({"name": "unlikelihood", "weight": 0.5}, pairs) == pytest.approx(
        nll + 0.5 * punished(span), rel=1e-9
    )
    assert loss({"name": "unlikelihood", "weight": 0.5, "shared": True}, pairs) == pytest.approx(
        nll + 0.5 * punished(mask), rel=1e-9
    )
    output = OBJECTIVES.build({"name": "unlikelihood", "weight": 0.5})(pairs)
    (gradient,) = torch.autograd.grad(output.loss, [logp])
    assert gradient.isfinite().all()
    assert gradient[0, 1].item() == pytest.approx(0.5 / 11 * math.exp(-2.0) / (1 - math.exp(-2.0)), rel=1e-9)
    assert float(gradient[1, 3]) == 0, "padding"


def test_reward_margins_come_from_the_data(model, encoder, examples) -> None:
    from cwdpo.data.encode.collate import collate
    from cwdpo.scoring import plain
    from cwdpo.scoring.pairs import reference_pass, scored_pairs

    rows = [
        replace(e, rejected=tuple(replace(c, made={"reward_margin": 0.25 * i}) for c in e.rejected))
        for i, e in enumerate(examples[:3])
    ]
    encoded, _ = encoder.encode_all(rows, "rejected", require_negative=True)
    batch = collate(reference_pass(model, encoded))
    pairs = scored_pairs(batch, plain.score(model, batch))
    assert pairs.rejected.reward_margin is not None
    assert pairs.rejected.reward_margin.tolist() == pytest.approx([0.25 * i for i in pairs.prompt.tolist()])


def test_the_collision_term_is_the_log_of_the_sum_of_squares(model, encoder, examples) -> None:
    from cwdpo.data.encode.collate import collate
    from cwdpo.scoring.score import score
    from random_models import distributions

    encoded, _ = encoder.encode_all(examples[:3], "rejected", require_negative=True)
    batch = collate(encoded)
    tokens = score(model, batch, stats=["collision", "uniform", *DETAILS])
    full = distributions(model, batch).double()
    wanted = (full.exp() ** 2).sum(-1).log()
    torch.testing.assert_close(tokens.stats["collision"][tokens.mask].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["madpo", "uni_dpo", {"name": "uni_dpo", "eta": 0.0}, "dpo"])
def test_missing_margins_are_said_before_anything_is_trained(objective: Any, tmp_path: Path) -> None:
    data = {
        "world": {"seed": 3, "train": 6, "validation": 2, "test": 0, "questions": 0.0},
        "stage1_fraction": 0.5,
    }
    recipe = parse_recipe({"data": data, "stage2": {"objective": objective}})
    if objective in ("madpo", "uni_dpo"):
        with pytest.raises(
            DataError, match=rf"train\.jsonl:\d+: {objective}: a negative has no made.reward_margin"
        ):
            prepare_data(recipe, RunDir(tmp_path / "run"))
    else:
        assert prepare_data(recipe, RunDir(tmp_path / "run")).stage2
