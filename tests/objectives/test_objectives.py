"""The losses, by hand arithmetic: values, gradients, micro-batches, settings.

Expected numbers come from python's ``math`` on small inputs, never from the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cwdpo.errors import RecipeError
from cwdpo.objectives.base import OBJECTIVES, Objective, ObjectiveOutput, Scored, ScoredPairs, StepTotals
from cwdpo.objectives.cw_dpo import MIN_TAU, CwDpo, calibrate, floor_for_weight
from cwdpo.objectives.dpo import Dpo
from cwdpo.objectives.sft import Sft
from cwdpo.objectives.sft_constrained import SftConstrained
from cwdpo.objectives.sft_smoothed import SftSmoothed

ALL: dict[str, Objective] = {
    "sft": Sft(),
    "sft_constrained": SftConstrained(penalty=0.7, constraint=2.0),
    "sft_smoothed": SftSmoothed(weight=0.3, smoothing=0.2),
    "dpo": Dpo(beta=0.4, sft_weight=0.5),
    "cw_dpo": CwDpo(beta=0.4, floor=-1.5, tau=0.6, sft_weight=0.5),
    "cw_dpo_through": CwDpo(beta=0.4, floor=-1.5, tau=0.6, weight_gradient="through"),
    "cw_dpo_span": CwDpo(beta=0.4, floor=-1.5, tau=0.6, negative_mask="differing_span"),
}

# Three prompts; the first has two negatives, the second one, the third none.
CHOSEN, CHOSEN_TOKENS, CHOSEN_REFERENCE = [-3.0, -4.5, -2.0], [4, 5, 2], [-3.5, -4.0, -2.5]
REJECTED, REJECTED_TOKENS, REJECTED_REFERENCE = [-6.0, -9.0, -5.0], [4, 3, 5], [-5.0, -7.0, -5.5]
SPAN, SPAN_REFERENCE = [-2.0, -4.0, -1.0], [-1.5, -3.0, -1.2]
UNIFORM = [-14.0, -11.0, -20.0]
PROMPT = [0, 0, 1]


def vector(values: Sequence[float], *, grad: bool = False) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, requires_grad=grad)


def make(**changes: Any) -> ScoredPairs:
    """The batch above; ``changes`` replace a list by its name, ``totals`` is passed on."""
    given = {
        "chosen": CHOSEN, "chosen_tokens": CHOSEN_TOKENS, "chosen_reference": CHOSEN_REFERENCE,
        "rejected": REJECTED, "rejected_tokens": REJECTED_TOKENS, "rejected_reference": REJECTED_REFERENCE,
        "span": SPAN, "span_reference": SPAN_REFERENCE, "uniform": UNIFORM, "prompt": PROMPT, "totals": None,
    } | changes  # fmt: skip
    chosen = Scored(
        vector(given["chosen"], grad=True),
        torch.tensor(given["chosen_tokens"]),
        vector(given["chosen_reference"]),
    )
    rejected = Scored(
        sum_logp=vector(given["rejected"], grad=True),
        n_tokens=torch.tensor(given["rejected_tokens"], dtype=torch.int64),
        reference_sum_logp=vector(given["rejected_reference"]),
        span_sum_logp=vector(given["span"], grad=True),
        span_reference_sum_logp=vector(given["span_reference"]),
        stats={"uniform": vector(given["uniform"], grad=True)},
    )
    return ScoredPairs(chosen, rejected, torch.tensor(given["prompt"], dtype=torch.int64), given["totals"])


def one(
    chosen_shift: float, rejected_shift: float, *, rejected: float = -8.0, tokens: int = 4
) -> ScoredPairs:
    """One pair with the given shifts; ``rejected`` is the policy's sum_logp of its ``tokens`` tokens."""
    return make(
        chosen=[-3.0], chosen_tokens=[3], chosen_reference=[-3.0 - chosen_shift], prompt=[0],
        rejected=[rejected], rejected_tokens=[tokens], rejected_reference=[rejected - rejected_shift],
        span=[rejected], span_reference=[rejected - rejected_shift], uniform=[-20.0],
    )  # fmt: skip


def leaves(pairs: ScoredPairs) -> tuple[Tensor, ...]:
    span, uniform = pairs.rejected.span_sum_logp, pairs.rejected.stats["uniform"]
    assert span is not None
    return pairs.chosen.sum_logp, pairs.rejected.sum_logp, span, uniform


def gradients(output: ObjectiveOutput, pairs: ScoredPairs) -> tuple[Tensor, ...]:
    """Gradients of the loss by chosen, rejected, span and uniform sums; zero where it does not depend."""
    found = torch.autograd.grad(output.loss, leaves(pairs), allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves(pairs), strict=True))


def softplus_of_minus(x: float) -> float:
    return math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


NLL = (3.0 + 4.5 + 2.0) / (4 + 5 + 2)
NEGATIVE_NLL = (6.0 + 9.0 + 5.0) / (4 + 3 + 5)


def dpo_by_hand(beta: float, weights: Sequence[float]) -> float:
    first = softplus_of_minus(beta * (0.5 - weights[0] * -1.0))
    second = softplus_of_minus(beta * (0.5 - weights[1] * -2.0))
    third = softplus_of_minus(beta * (-0.5 - weights[2] * 0.5))
    return ((first + second) / 2 + third) / 2  # the third prompt has no pair and does not count


# --- values ---------------------------------------------------------------------------------------------


def test_sft_is_the_mean_nll_per_token() -> None:
    output = Sft()(make())
    assert output.loss.item() == pytest.approx(NLL, rel=1e-12)
    assert output.parts["loss/nll"].item() == pytest.approx(NLL, rel=1e-12)


@pytest.mark.parametrize(
    ("constraint", "slack", "penalty"),
    [
        (2.0, True, 0.1 * (2.0 - NEGATIVE_NLL)),  # too likely: pushed away
        (1.5, True, 0.0),  # far enough: silent
        (2.0, False, 0.1 * (2.0 - NEGATIVE_NLL)),
        (1.5, False, 0.1 * (1.5 - NEGATIVE_NLL)),  # without slack it goes on, below zero
    ],
)
def test_sft_constrained(constraint: float, slack: bool, penalty: float) -> None:
    pairs = make()
    output = SftConstrained(penalty=0.1, constraint=constraint, slack=slack)(pairs)
    assert output.loss.item() == pytest.approx(NLL + penalty, rel=1e-12)
    assert output.parts["loss/penalty"].item() == pytest.approx(penalty, abs=1e-12)
    assert output.parts["loss/negative_nll"].item() == pytest.approx(NEGATIVE_NLL, rel=1e-12)
    rejected = gradients(output, pairs)[1]
    # lambda * (C - NLL) falls as the negatives sink: descent lowers them, each token alike.
    assert rejected.tolist() == pytest.approx([0.1 / 12 if penalty else 0.0] * 3)


def test_sft_smoothed() -> None:
    uniform = (14.0 + 11.0 + 20.0) / (4 + 3 + 5)
    smoothed = 0.03 * (0.8 * NEGATIVE_NLL + 0.2 * uniform)
    output = SftSmoothed(weight=0.03, smoothing=0.2)(make())
    assert output.loss.item() == pytest.approx(NLL + smoothed, rel=1e-12)
    assert output.parts["loss/smoothed"].item() == pytest.approx(smoothed, rel=1e-12)


def test_dpo() -> None:
    output = Dpo(beta=0.4)(make())
    assert output.loss.item() == pytest.approx(dpo_by_hand(0.4, [1, 1, 1]), rel=1e-12)
    with_sft = Dpo(beta=0.4, sft_weight=2.0)(make())
    assert with_sft.loss.item() == pytest.approx(dpo_by_hand(0.4, [1, 1, 1]) + 2 * NLL, rel=1e-12)
    assert with_sft.parts["loss/preference"].item() == pytest.approx(dpo_by_hand(0.4, [1, 1, 1]), rel=1e-12)
    assert output.per_pair["rewards/chosen"].tolist() == pytest.approx([0.2, 0.2, -0.2])
    assert output.per_pair["rewards/rejected"].tolist() == pytest.approx([-0.4, -0.8, 0.2])
    assert output.per_pair["rewards/margins"].tolist() == pytest.approx([0.6, 1.0, -0.4])
    assert output.per_pair["rewards/accuracies"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("weight_gradient", ["detach", "through"])
def test_cw_dpo(weight_gradient: str) -> None:
    weights = [sigmoid((m + 1.5) / 0.6) for m in (-6 / 4, -9 / 3, -5 / 5)]
    assert weights[0] == 0.5
    objective = CwDpo.model_validate(
        {"beta": 0.4, "floor": -1.5, "tau": 0.6, "weight_gradient": weight_gradient}
    )
    output = objective(make())
    assert output.loss.item() == pytest.approx(dpo_by_hand(0.4, weights), rel=1e-12)
    assert output.per_pair["cooling/weight"].tolist() == pytest.approx(weights, rel=1e-12)
    with_sft = CwDpo(beta=0.4, floor=-1.5, tau=0.6, sft_weight=2.0)(make())
    assert with_sft.loss.item() == pytest.approx(dpo_by_hand(0.4, weights) + 2 * NLL, rel=1e-12)


def test_constant_cooling_needs_neither_floor_nor_tau() -> None:
    output = CwDpo(beta=0.4, cooling="constant", constant_weight=0.3)(make())
    assert output.loss.item() == pytest.approx(dpo_by_hand(0.4, [0.3] * 3), rel=1e-12)
    assert output.per_pair["cooling/weight"].tolist() == [0.3] * 3


@pytest.mark.parametrize("objective", [Dpo(), CwDpo(floor=-1.5, tau=0.6)])
def test_a_prompt_counts_once_however_many_negatives_it_has(objective: Objective) -> None:
    twice = make(
        rejected=[-6.0, -6.0, -5.0], rejected_tokens=[4, 4, 5], rejected_reference=[-5.0, -5.0, -5.5]
    )
    once = make(
        rejected=[-6.0, -5.0], rejected_tokens=[4, 5], rejected_reference=[-5.0, -5.5], prompt=[0, 1],
        span=[0.0, 0.0], span_reference=[0.0, 0.0], uniform=[0.0, 0.0],
    )  # fmt: skip
    assert objective(twice).loss.item() == pytest.approx(objective(once).loss.item(), rel=1e-12)


@pytest.mark.parametrize("objective", [Sft(), SftConstrained(), SftSmoothed()])
def test_stage_1_without_a_negative_is_plain_sft(objective: Objective) -> None:
    empty: list[float] = []
    pairs = make(rejected=empty, rejected_tokens=empty, rejected_reference=empty, prompt=empty,
                 span=empty, span_reference=empty, uniform=empty)  # fmt: skip
    assert objective(pairs).loss.item() == pytest.approx(NLL, rel=1e-12)


# --- gradients ------------------------------------------------------------------------------------------


def test_gradient_signs() -> None:
    """Descent raises chosen everywhere; it lowers negatives, except in the smoothed objective."""
    rejected_signs = {
        "sft": [0, 0, 0],
        "sft_smoothed": [-1, -1, -1],
        "cw_dpo_span": [0, 0, 0],
        # The second negative lies beyond the turn: -2.0 / 3 < -0.6 / (1 - sigmoid(-2.5)) = -0.65.
        "cw_dpo_through": [1, -1, 1],
    }
    for name, objective in ALL.items():
        pairs = make()
        chosen, rejected, span, uniform = gradients(objective(pairs), pairs)
        only_pairs = name.startswith("cw_dpo_")  # no SFT term: the prompt without a pair has no gradient
        assert chosen.sign().tolist() == [-1, -1, 0 if only_pairs else -1], name
        assert rejected.sign().tolist() == rejected_signs.get(name, [1, 1, 1]), name
        assert span.sign().tolist() == [1 if name == "cw_dpo_span" else 0] * 3, name
        assert uniform.sign().tolist() == [-1 if name == "sft_smoothed" else 0] * 3, name


def test_gradients_of_dpo_and_cw_dpo_by_hand() -> None:
    for objective, w in ((Dpo(beta=0.4), 1.0), (CwDpo(beta=0.4, floor=-2.0, tau=0.6), 0.5)):
        pairs = one(chosen_shift=0.5, rejected_shift=-1.0)  # mean_logp = -2: w = 0.5
        chosen, rejected, *_ = gradients(objective(pairs), pairs)
        slope = 0.4 * sigmoid(-0.4 * (0.5 + w))
        assert chosen.item() == pytest.approx(-slope, rel=1e-12)
        assert rejected.item() == pytest.approx(w * slope, rel=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("chosen_shift", [-1e4, 1e4])
@pytest.mark.parametrize("rejected_shift", [-1e4, 1e4])
@pytest.mark.parametrize("rejected", [-2e4, -0.5])
def test_finite_at_wide_shifts(
    name: str, chosen_shift: float, rejected_shift: float, rejected: float
) -> None:
    pairs = one(chosen_shift, rejected_shift, rejected=rejected)
    output = ALL[name](pairs)
    assert math.isfinite(output.loss.item())
    for gradient in gradients(output, pairs):
        assert gradient.isfinite().all()
    for value in output.per_pair.values():
        assert value.isfinite().all()


def test_wide_shifts_have_the_exact_limits() -> None:
    right, wrong = one(1e4, -1e4), one(-1e4, 1e4)
    assert Dpo(beta=0.1)(right).loss.item() == 0.0
    assert Dpo(beta=0.1)(wrong).loss.item() == pytest.approx(2000.0, rel=1e-12)
    output = Dpo(beta=0.1)(wrong)
    chosen, rejected, *_ = gradients(output, wrong)
    assert (chosen.item(), rejected.item()) == (pytest.approx(-0.1), pytest.approx(0.1))


# --- the step's totals ----------------------------------------------------------------------------------


def step(negative_nll: float | None = NEGATIVE_NLL) -> StepTotals:
    """The totals of a step; two micro-batches share its NLL of the negatives."""
    ahead = None if negative_nll is None else (5 * negative_nll, 7 * negative_nll)
    return StepTotals(prompts=2, chosen_tokens=11, rejected_tokens=12, ahead=ahead)


def micro_batches(totals: StepTotals) -> list[ScoredPairs]:
    """The batch of :func:`make`, a prompt at a time; the last one has no negative."""
    pieces = []
    for b in range(3):
        rows = [i for i, p in enumerate(PROMPT) if p == b]
        pick = {
            "rejected": REJECTED, "rejected_tokens": REJECTED_TOKENS, "span": SPAN, "uniform": UNIFORM,
            "rejected_reference": REJECTED_REFERENCE, "span_reference": SPAN_REFERENCE,
        }  # fmt: skip
        piece: dict[str, Any] = {key: [values[i] for i in rows] for key, values in pick.items()}
        pieces.append(
            make(chosen=CHOSEN[b : b + 1], chosen_tokens=CHOSEN_TOKENS[b : b + 1], totals=totals,
                 chosen_reference=CHOSEN_REFERENCE[b : b + 1], prompt=[0] * len(rows), **piece)
        )  # fmt: skip
    return pieces


@pytest.mark.parametrize(
    "objective",
    [
        *ALL.values(),
        SftConstrained(penalty=0.7, constraint=1.5),  # inactive over the step, active for prompts 0 and 1
        SftConstrained(penalty=0.7, constraint=2.0, slack=False),
        SftConstrained(penalty=0.7, constraint=1.5, slack=False),
    ],
    ids=repr,
)
def test_micro_batches_add_up_to_the_step(objective: Objective) -> None:
    whole = make()
    output = objective(whole)
    expected = gradients(output, whole)
    pieces = micro_batches(step())
    outputs = [objective(piece) for piece in pieces]
    assert sum(o.loss.item() for o in outputs) == pytest.approx(output.loss.item(), rel=1e-12)
    parts = [gradients(o, p) for o, p in zip(outputs, pieces, strict=True)]
    for column, gradient in enumerate(expected):
        joined = torch.cat([part[column] for part in parts])
        torch.testing.assert_close(joined, gradient, rtol=1e-12, atol=1e-15)
    for name, value in output.parts.items():
        shares = sum(float(o.parts[name]) for o in outputs if name in o.parts)
        assert shares == pytest.approx(value.item(), rel=1e-12), name


def test_the_penalty_switch_is_the_step_s_and_not_the_micro_batch_s() -> None:
    # The second prompt's negatives are likelier (NLL 1.0) than the step's (1.67): C = 1.5 lies between.
    objective = SftConstrained(penalty=1.0, constraint=1.5)
    likely = micro_batches(step())[1]
    assert not gradients(objective(likely), likely)[1].any()
    switched_on = micro_batches(step(negative_nll=1.2))[1]
    assert gradients(objective(switched_on), switched_on)[1].all()


# --- cooling --------------------------------------------------------------------------------------------


def test_constant_weight_one_is_dpo_exactly() -> None:
    for sft_weight in (0.0, 0.7):
        dpo, cooled = make(), make()
        first = Dpo(beta=0.4, sft_weight=sft_weight)(dpo)
        second = CwDpo(beta=0.4, cooling="constant", constant_weight=1.0, sft_weight=sft_weight)(cooled)
        assert torch.equal(first.loss, second.loss)
        for a, b in zip(gradients(first, dpo), gradients(second, cooled), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("weight_gradient", ["detach", "through"])
def test_a_floor_far_below_is_dpo(weight_gradient: str) -> None:
    dpo, cooled = make(), make()
    first = Dpo(beta=0.4)(dpo)
    second = CwDpo.model_validate(
        {"beta": 0.4, "floor": -1e6, "tau": 0.5, "weight_gradient": weight_gradient}
    )(cooled)
    assert torch.equal(second.per_pair["cooling/weight"], torch.ones(3, dtype=torch.float64))
    assert torch.equal(first.loss, second.loss)
    for a, b in zip(gradients(first, dpo), gradients(second, cooled), strict=True):
        assert torch.equal(a, b)


def test_easy_negatives_lose_their_gradient_and_chosen_keeps_its_own() -> None:
    objective = CwDpo(beta=0.4, floor=-1.0, tau=0.5)
    sizes = []
    for mean_logp in (-1.0, -2.0, -4.0, -8.0, -30.0):
        pairs = one(0.0, 0.0, rejected=4 * mean_logp)
        chosen, rejected, *_ = gradients(objective(pairs), pairs)
        assert chosen.item() == pytest.approx(-0.2, rel=1e-12)  # beta * sigmoid(0)
        assert rejected.item() == pytest.approx(0.2 * sigmoid((mean_logp + 1.0) / 0.5), rel=1e-9)
        sizes.append(rejected.item())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-20


def test_detached_weight_has_no_gradient_and_through_has_one() -> None:
    for mode in ("detach", "through"):
        objective = CwDpo.model_validate({"floor": -1.0, "tau": 0.5, "weight_gradient": mode})
        assert objective.weight(make()).requires_grad is (mode == "through")


def test_through_matches_finite_differences() -> None:
    objective = CwDpo(beta=0.4, floor=-1.5, tau=0.6, weight_gradient="through")
    pairs = make()
    gradient = gradients(objective(pairs), pairs)[1]
    h = 1e-5
    for i in range(3):
        up, down = list(REJECTED), list(REJECTED)
        up[i] += h
        down[i] -= h
        slope = (objective(make(rejected=up)).loss - objective(make(rejected=down)).loss).item() / (2 * h)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-7)
    detached_pairs = make()
    detached = gradients(CwDpo(beta=0.4, floor=-1.5, tau=0.6)(detached_pairs), detached_pairs)[1]
    assert not torch.allclose(gradient, detached, rtol=1e-2)


@pytest.mark.parametrize("mean_logp", [-1.0, -1.6, -3.0])
def test_through_pushes_a_negative_up_from_the_stated_shift_on(mean_logp: float) -> None:
    """The sign flips at rejected_shift / n_tokens = -tau / (1 - w); detached it never does."""
    tokens, floor, tau = 4, -1.5, 0.6
    w = sigmoid((mean_logp - floor) / tau)
    turn = -tokens * tau / (1 - w)
    through = CwDpo(beta=0.3, floor=floor, tau=tau, weight_gradient="through")
    detach = CwDpo(beta=0.3, floor=floor, tau=tau)
    for factor, sign in ((0.0, 1), (0.5, 1), (1 - 1e-6, 1), (1 + 1e-6, -1), (2.0, -1)):
        pairs = one(0.2, turn * factor, rejected=tokens * mean_logp, tokens=tokens)
        assert math.copysign(1, gradients(through(pairs), pairs)[1].item()) == sign, factor
        pairs = one(0.2, turn * factor, rejected=tokens * mean_logp, tokens=tokens)
        assert gradients(detach(pairs), pairs)[1].item() > 0, factor


# --- calibration ----------------------------------------------------------------------------------------


def test_calibrate_by_hand() -> None:
    # Six values: the 10th percentile lies halfway between the two lowest (position 0.1 * 5).
    floor, tau = calibrate([-0.9, -2.0, -1.0, -0.2, -0.6, -0.4])
    low, median = (-2.0 + -1.0) / 2, (-0.9 + -0.6) / 2
    assert floor == pytest.approx(low, rel=1e-12)
    assert tau == pytest.approx(median - low, rel=1e-12)
    assert calibrate([-1.0, -1.0, -1.0]) == (-1.0, MIN_TAU)


@pytest.mark.parametrize("samples", [[], [-1.0]])
def test_calibrate_refuses_too_few_samples(samples: list[float]) -> None:
    with pytest.raises(RecipeError, match=rf"{len(samples)} sample.*floor and tau as numbers"):
        calibrate(samples)


def test_calibrated_replaces_auto_and_nothing_else() -> None:
    samples = [-0.9, -2.0, -1.0, -0.2, -0.6, -0.4]
    both = CwDpo(beta=0.7)
    assert both.needs_calibration
    found = both.calibrated(samples)
    assert (found.beta, found.floor, found.tau) == (0.7, pytest.approx(-1.5), pytest.approx(0.75))
    assert not found.needs_calibration
    assert (both.floor, both.tau) == ("auto", "auto")
    assert CwDpo(floor=-3.0).calibrated(samples).floor == -3.0
    assert CwDpo(floor=-3.0).calibrated(samples).tau == pytest.approx(0.75)
    assert CwDpo(tau=2.0).calibrated(samples).tau == 2.0
    assert not CwDpo(cooling="constant").needs_calibration
    assert not CwDpo(floor=-1.0, tau=0.5).needs_calibration
    assert CwDpo(floor=-1.0).needs_calibration
    assert CwDpo(tau=0.5).needs_calibration


def test_the_floor_of_a_target_weight() -> None:
    negatives = [-0.5, -1.0, -4.0, -9.0]
    for target, tau in ((0.05, 0.3), (0.5, 0.05), (0.9, 2.0)):
        floor = floor_for_weight(target, negatives, tau)
        assert sum(sigmoid((m - floor) / tau) for m in negatives) / 4 == pytest.approx(target, abs=1e-9)
    samples = [-0.9, -2.0, -1.0, -0.2, -0.6, -0.4]
    found = CwDpo(target_weight=0.3).calibrated(samples, negatives)
    assert found.tau == pytest.approx(0.75), "tau is that of the samples"
    assert found.floor == pytest.approx(floor_for_weight(0.3, negatives, 0.75))
    assert CwDpo(target_weight=0.3).calibrates_on_negatives
    assert not found.calibrates_on_negatives
    assert not CwDpo().calibrates_on_negatives
    with pytest.raises(RecipeError, match="target_weight: there is no negative"):
        CwDpo(target_weight=0.3).calibrated(samples)
    for wrong in ({"floor": -1.0}, {"cooling": "constant"}):
        with pytest.raises(ValueError, match="target_weight sets the floor"):
            CwDpo(target_weight=0.3, **wrong)


# --- differing span, filter, errors ---------------------------------------------------------------------


def test_differing_span_restricts_the_rejected_side_only() -> None:
    weights = [sigmoid((m + 1.5) / 0.6) for m in (-6 / 4, -9 / 3, -5 / 5)]  # from the whole negative
    span_shifts = [-0.5, -1.0, 0.2]
    for objective, w in (
        (Dpo(beta=0.4, negative_mask="differing_span"), [1.0] * 3),
        (CwDpo(beta=0.4, floor=-1.5, tau=0.6, negative_mask="differing_span"), weights),
    ):
        losses = [
            softplus_of_minus(0.4 * (chosen - w[i] * span_shifts[i]))
            for i, chosen in enumerate((0.5, 0.5, -0.5))
        ]
        output = objective(make())
        assert output.per_pair["loss/pair"].tolist() == pytest.approx(losses, rel=1e-12)
        assert output.loss.item() == pytest.approx(((losses[0] + losses[1]) / 2 + losses[2]) / 2, rel=1e-12)


def test_filter_below_keeps_what_is_at_or_above_the_cut() -> None:
    objective = CwDpo(filter_below=-2.0)
    assert [objective.keeps(m) for m in (-2.1, -2.0, -1.9)] == [False, True, True]
    assert CwDpo().keeps(-1e9)
    assert all(objective.keeps(-1e9) for name, objective in ALL.items() if name != "cw_dpo")


@pytest.mark.parametrize("tau", [0, -0.5])
def test_tau_must_be_positive(tau: float) -> None:
    with pytest.raises(RecipeError, match=r"cw_dpo.*tau must be greater than 0"):
        OBJECTIVES.build({"name": "cw_dpo", "tau": tau})


@pytest.mark.parametrize("known", [{}, {"floor": -1.0}, {"tau": 0.5}])
def test_auto_must_be_calibrated_before_the_first_call(known: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="calibrate first"):
        CwDpo.model_validate(known)(make())


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "dpo", "beta": 0},
        {"name": "dpo", "sft_weight": -1},
        {"name": "dpo", "negative_mask": "some"},
        {"name": "cw_dpo", "constant_weight": 1.5},
        {"name": "cw_dpo", "cooling": "slow"},
        {"name": "cw_dpo", "floor": "low"},
        {"name": "cw_dpo", "floor": math.nan},
        {"name": "sft_constrained", "constraint": 0},
        {"name": "sft_constrained", "penalty": math.inf},
        {"name": "sft_smoothed", "smoothing": 1.1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(spec: dict[str, Any]) -> None:
    name, key = spec["name"], list(spec)[1]
    with pytest.raises(RecipeError, match=f"{name}: {key}"):
        OBJECTIVES.build(spec)


# --- ablations of the cooling weight -------------------------------------------------------------------


def test_permuted_cooling_deals_the_weights_of_the_step_to_other_pairs() -> None:
    settings = {"beta": 0.4, "floor": -1.5, "tau": 0.6}
    pairs = make()
    own = CwDpo(**settings)(pairs).per_pair["cooling/weight"]
    dealt = CwDpo(**settings, cooling="permuted")(pairs).per_pair["cooling/weight"]
    assert sorted(dealt.tolist()) == pytest.approx(sorted(own.tolist()))
    assert dealt.tolist() == CwDpo(**settings, cooling="permuted")(make()).per_pair["cooling/weight"].tolist()
    orders = set()
    for k in range(60):
        moved = make(rejected=[r - 0.01 * k for r in REJECTED])
        weights = CwDpo(**settings, cooling="permuted")(moved).per_pair["cooling/weight"]
        orders.add(tuple(weights.argsort().tolist()))
    assert len(orders) == 6, "every order of three pairs comes up"
    with pytest.raises(RecipeError, match="permuted shuffles the weights within one forward pass"):
        CwDpo(**settings, cooling="permuted")(make(totals=step()))


def test_matched_cooling_gives_every_pair_the_mean_weight_of_the_step() -> None:
    settings = {"beta": 0.4, "floor": -1.5, "tau": 0.6}
    means = [r / n for r, n in zip(REJECTED, REJECTED_TOKENS, strict=True)]
    mean = sum(sigmoid((m + 1.5) / 0.6) for m in means) / 3
    matched = CwDpo(**settings, cooling="matched")
    assert matched(make()).per_pair["cooling/weight"].tolist() == pytest.approx([mean] * 3)
    constant = CwDpo(beta=0.4, cooling="constant", constant_weight=mean)
    assert matched(make()).loss.item() == pytest.approx(constant(make()).loss.item(), rel=1e-12)
    totals = StepTotals(prompts=2, chosen_tokens=11, rejected_tokens=12, ahead=tuple(means))
    split = sum(matched(piece).loss.item() for piece in micro_batches(totals))
    assert split == pytest.approx(matched(make()).loss.item(), rel=1e-12)
