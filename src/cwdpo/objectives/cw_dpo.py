"""Cooling-Weighted DPO: negatives that are already unlikely under the policy get a small weight.

Source: "Learning Dynamics of VLM Finetuning" (arXiv 2510.11978), stage 2:
``w = sigmoid((mean_logp_policy(rejected) - floor) / tau)``,
``L = -log sigmoid(beta * (chosen_shift - w * rejected_shift))``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cwdpo.errors import RecipeError
from cwdpo.objectives.base import (
    NegativeMask,
    Objective,
    ObjectiveOutput,
    Scale,
    ScoredPairs,
    negative_log_sigmoid,
    rewards,
)

if TYPE_CHECKING:
    from torch import Tensor

MIN_TAU = 0.05
"""Smallest calibrated tau, in nats per token. With a smaller one the weight would be almost a step function."""


def cooling_weight(mean_logp: Tensor, floor: float, tau: float) -> Tensor:
    """``sigmoid((mean_logp - floor) / tau)`` [P], in (0, 1): near 0 for easy negatives, near 1 for hard ones.

    >>> import torch
    >>> [f"{w:.4f}" for w in cooling_weight(torch.tensor([-0.5, -5.0]), floor=-0.5, tau=0.5)]
    ['0.5000', '0.0001']
    """
    return ((mean_logp - floor) / tau).sigmoid()


def calibrate(mean_logps: Sequence[float]) -> tuple[float, float]:
    """``(floor, tau)`` in nats per token, from the mean_logp of samples of the reference model.

    ``floor`` is the 10th percentile, and ``tau`` is the median minus the 10th percentile (at least :data:`MIN_TAU`).
    So a negative as likely as a typical sample keeps most of its weight, and a negative that the model would hardly
    generate loses it. The negatives of the data set are *not* used: with a mixed pool tau becomes so large that
    no weight falls (docs/decisions.md).

    >>> floor, tau = calibrate([-1.0, -0.8, -0.6, -0.4, -0.2])
    >>> round(floor, 2), round(tau, 2)
    (-0.92, 0.32)
    """
    import numpy as np

    if len(mean_logps) < 2:
        raise RecipeError(
            f"cooling cannot be calibrated from {len(mean_logps)} sample(s), it needs two: "
            "give floor and tau as numbers"
        )
    low, median = np.quantile(np.asarray(mean_logps, dtype=float), [0.1, 0.5])
    return float(low), max(MIN_TAU, float(median - low))


def floor_for_weight(target: float, mean_logps: Sequence[float], tau: float) -> float:
    """The floor (nats per token) at which the mean of ``sigmoid((mean_logp - floor) / tau)`` is ``target``.

    The mean weight falls as the floor rises, so that there is exactly one such floor; bisection finds it.

    Args:
        target: the mean weight, between 0 and 1.
        mean_logps: mean_logp of the negatives, nats per token; at least one.
        tau: nats per token.

    >>> round(floor_for_weight(0.5, [-3.0, -1.0], tau=0.5), 6)
    -2.0
    """
    import numpy as np

    values = np.asarray(mean_logps, dtype=float)
    # A single negative with this weight has its floor at mean_logp - tau * log(target / (1 - target)).
    offset = tau * float(np.log(target / (1 - target)))
    low, high = float(values.min()) - offset, float(values.max()) - offset
    for _ in range(100):
        middle = (low + high) / 2
        weight = float((1 / (1 + np.exp(np.clip((middle - values) / tau, -700, 700)))).mean())
        low, high = (middle, high) if weight > target else (low, middle)
    return (low + high) / 2


class CwDpo(Objective):
    """``L = mean -log sigmoid(beta * (chosen_shift - w * rejected_shift)) + sft_weight * mean NLL(chosen)``.

    Args:
        beta: inverse temperature, per nat.
        cooling: ``adaptive`` is the method; the others are ablations. ``constant``: w is ``constant_weight``.
            ``permuted``: the adaptive weights of the step are shuffled among its pairs. ``matched``: every pair gets
            the mean of the step's adaptive weights. The last two keep the size of the weights, but a weight no longer
            depends on its own negative.
        floor, tau: in nats per token; ``auto`` calibrates them before stage 2, see :func:`calibrate`.
        target_weight: with ``floor: auto``: the floor is set so that the mean weight over the negatives of the run is
            this when stage 2 begins, instead of the percentile of :func:`calibrate`. It makes the strength of the
            cooling comparable between models and data sets.
        constant_weight: w when ``cooling`` is ``constant``; 1 is vanilla DPO.
        weight_gradient: ``detach`` treats w as a constant. ``through`` differentiates it, which makes a negative
            *more* likely once ``rejected_shift / n_tokens < -tau / (1 - w)``.
        filter_below: negatives with a lower mean_logp under the reference (nats per token) are left out.
        sft_weight: weight of an SFT term on chosen.
        negative_mask: see :class:`cwdpo.objectives.dpo.Dpo`; w is always computed from all tokens of the negative.
    """

    calibrates: ClassVar[tuple[str, ...]] = ("floor", "tau")

    beta: float = Field(0.3, gt=0)
    cooling: Literal["adaptive", "constant", "permuted", "matched"] = "adaptive"
    floor: float | Literal["auto"] = "auto"
    tau: float | Literal["auto"] = "auto"
    target_weight: float | None = Field(None, gt=0, lt=1)
    constant_weight: float = Field(1.0, ge=0, le=1)
    weight_gradient: Literal["detach", "through"] = "detach"
    filter_below: float | None = None
    sft_weight: float = Field(0.0, ge=0)
    negative_mask: NegativeMask = "none"

    @model_validator(mode="after")
    def _positive_tau(self) -> CwDpo:
        if self.tau != "auto" and self.tau <= 0:
            raise ValueError(f"tau must be greater than 0 nats per token, got {self.tau}")
        return self

    @model_validator(mode="after")
    def _one_floor(self) -> CwDpo:
        if self.target_weight is None:
            return self
        if self.cooling == "constant":
            raise ValueError("target_weight sets the floor of an adaptive weight: here set constant_weight")
        if self.floor != "auto":
            raise ValueError("target_weight sets the floor: leave out one of the two")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether floor or tau is still ``auto``; a constant weight needs neither."""
        return self.cooling != "constant" and super().needs_calibration

    @property
    def looks_ahead(self) -> bool:
        """Whether the weight of a pair depends on the other pairs of the step."""
        return self.cooling in ("permuted", "matched")

    @property
    def calibrates_on_negatives(self) -> bool:
        """Whether the floor follows from ``target_weight``."""
        return self.target_weight is not None and self.needs_calibration

    def calibrated(self, mean_logps: Sequence[float], negatives: Sequence[float] = ()) -> Self:
        """Replace ``auto`` by the values of :func:`calibrate`; a floor or tau given as a number is kept.

        With ``target_weight`` the floor is that of :func:`floor_for_weight` over the negatives.

        Raises:
            RecipeError: fewer than two samples; ``target_weight`` without negatives.
        """
        values = dict(zip(self.calibrates, calibrate(mean_logps), strict=True))
        if self.calibrates_on_negatives and self.target_weight is not None:
            if not negatives:
                raise RecipeError("cw_dpo: target_weight: there is no negative to set the floor by")
            tau = values["tau"] if self.tau == "auto" else self.tau
            values["floor"] = floor_for_weight(self.target_weight, negatives, tau)
        return self.model_copy(update={k: v for k, v in values.items() if getattr(self, k) == "auto"})

    def uncertainty(self, intervals: Mapping[str, tuple[float, float]]) -> float:
        """The largest distance of floor or tau from an end of its interval, in units of tau.

        The weight is a sigmoid of ``(mean_logp - floor) / tau``, so an error of floor of e tau moves the argument by e,
        and the weight by e / 4 at most, whatever the model's spread of log-likelihoods is.
        """
        _, tau = self._floor_and_tau()
        return max(
            (abs(end - getattr(self, n)) / tau for n, ends in intervals.items() for end in ends), default=0.0
        )

    def probe_scale(self) -> Scale:
        """Floor and tau, or the constant weight, and beta."""
        if self.cooling == "constant":
            return Scale(beta=self.beta, weight=self.constant_weight)
        return Scale(*self._floor_and_tau(), beta=self.beta)

    def logged(self) -> Mapping[str, float]:
        """``cooling/floor`` and ``cooling/tau``."""
        if self.cooling == "constant":
            return {}
        floor, tau = self._floor_and_tau()
        return {"cooling/floor": floor, "cooling/tau": tau}

    def _floor_and_tau(self) -> tuple[float, float]:
        if self.floor == "auto" or self.tau == "auto":
            raise RecipeError("cw_dpo: floor or tau is 'auto': calibrate first, or give both as numbers")
        return self.floor, self.tau

    def weight(self, pairs: ScoredPairs) -> Tensor:
        """[P] the weight of each negative; carries a gradient only with ``weight_gradient: through``."""
        mean_logp = pairs.rejected.mean_logp
        if self.cooling == "constant":
            return mean_logp.detach().new_full(mean_logp.shape, self.constant_weight)
        if self.cooling in ("permuted", "matched"):
            return self._of_the_step(pairs)
        if self.weight_gradient == "detach":
            mean_logp = mean_logp.detach()
        return cooling_weight(mean_logp, *self._floor_and_tau())

    def _of_the_step(self, pairs: ScoredPairs) -> Tensor:
        """[P] the weights of the ablations, computed from the negatives of the whole step; without gradient."""
        mean_logp = pairs.rejected.mean_logp.detach()
        whole = None if pairs.totals is None else pairs.totals.ahead
        everyone = mean_logp if whole is None else mean_logp.new_tensor(whole)
        weights = cooling_weight(everyone, *self._floor_and_tau())
        if self.cooling == "matched":
            return weights.mean().expand(len(mean_logp)) if len(weights) else weights
        if whole is not None:
            raise RecipeError(
                "cw_dpo: cooling: permuted shuffles the weights within one forward pass: set "
                "train.gradient_accumulation_steps: 1 and use one process"
            )
        # A random order, seeded by the values themselves, so that a repeated run draws the same order.
        values = mean_logp.tolist()
        order = random.Random(repr(values)).sample(range(len(values)), len(values))
        return weights[order]

    def ahead(self, pairs: ScoredPairs) -> list[float]:
        """mean_logp of the micro-batch's negatives, in nats per token."""
        values: list[float] = pairs.rejected.mean_logp.detach().tolist()
        return values

    def keeps(self, reference_mean_logp: float) -> bool:
        """Whether a negative's mean_logp under the reference (nats per token) is at least ``filter_below``."""
        return self.filter_below is None or reference_mean_logp >= self.filter_below

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts; each pair has its own weight."""
        weight = self.weight(pairs)
        rejected_shift = pairs.rejected.masked_shift(self.negative_mask)
        per_pair = negative_log_sigmoid(self.beta * (pairs.chosen_shift - weight * rejected_shift))
        preference = pairs.mean_over_prompts(per_pair)
        nll = pairs.chosen_nll()
        loss = preference + self.sft_weight * nll if self.sft_weight else preference
        return ObjectiveOutput(
            loss,
            per_pair={
                "loss/pair": per_pair.detach(),
                "cooling/weight": weight.detach(),
                **rewards(pairs, self.beta),
            },
            parts={"loss/preference": preference.detach(), "loss/nll": nll.detach()},
        )
