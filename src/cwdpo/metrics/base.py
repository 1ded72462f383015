"""What a metric receives and what it returns; intervals and paired comparisons. Does not import torch.

A measured number is a function of sums over prompts. So the same bootstrap works for means, F1, BLEU and ECE: resample
the prompts, add their sums, apply the function. Comparisons are paired by prompt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from cwdpo.errors import DataError
from cwdpo.records import Example
from cwdpo.registry import Component, Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

RESAMPLES = 2000
_BATCH = 200
Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Answer:
    """One response to one prompt, and the other values that metrics need.

    Attributes:
        example: the example with the prompt.
        text: the response, greedy or sampled.
        option_logps: sum_logp of each of the example's options as a response, in nats.
        option_tokens: number of tokens of each option.
        top1: for each token of the chosen response, the model's largest probability.
        correct: for each token of the chosen response, whether it has that largest probability.
    """

    example: Example
    text: str = ""
    option_logps: tuple[float, ...] = ()
    option_tokens: tuple[int, ...] = ()
    top1: tuple[float, ...] = ()
    correct: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One number over P prompts.

    Attributes:
        name, unit, better, digits, help: for tables.
        parts: [P, k] the k sums of each prompt.
        combine: computes the number [...] from sums over prompts [..., k]; NaN if there is nothing to average.
        prompts: the P prompt ids, so that two measurements can be paired.
        n: number of values that the number is computed from.
        resample: ``False`` for numbers that change when prompts repeat (distinct words): they have no interval.
    """

    name: str
    parts: Numbers
    prompts: tuple[str, ...]
    n: int
    combine: Callable[[Numbers], Numbers] = field(repr=False)
    unit: str = ""
    better: Better = "higher"
    digits: int = 3
    help: str = ""
    resample: bool = True

    @property
    def value(self) -> float | None:
        """The number over all prompts; ``None`` if n is 0."""
        return _number(self.combine(self.parts.sum(0))) if self.n else None

    def interval(self, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Percentile bootstrap over prompts (scipy); ``None`` for fewer than two prompts or without ``resample``."""
        return _bootstrap(
            lambda index: self.combine(self.parts[index].sum(-2)), len(self.parts), confidence, seed, self
        )

    def to_json(self) -> dict[str, Any]:
        """Value, interval and counts as JSON."""
        bounds = self.interval()
        low, high = bounds or (None, None)
        return {
            "value": self.value,
            "low": low,
            "high": high,
            "n": self.n,
            "n_prompts": len(self.parts),
            "unit": self.unit,
        }


def difference(
    ours: Measured, theirs: Measured, *, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Ours minus theirs, paired by prompt, with a bootstrap interval and the p-value of a permutation test.

    Under the null hypothesis the two responses to a prompt can be exchanged (scipy's ``permutation_test``).

    Returns:
        ``value``, ``low``, ``high``, ``p`` and ``n_prompts``; a value that cannot be computed is ``None``.

    Raises:
        DataError: the two were not measured on the same prompts.
    """
    from scipy import stats

    if ours.prompts != theirs.prompts:
        raise DataError(
            f"{ours.name}: the two runs answer different prompts ({len(ours.prompts)} and {len(theirs.prompts)}): "
            "evaluate both on the same data"
        )
    found: dict[str, Any] = {
        "value": None,
        "low": None,
        "high": None,
        "p": None,
        "n_prompts": len(ours.prompts),
    }
    if ours.value is None or theirs.value is None:
        return found
    found["value"] = ours.value - theirs.value
    if not ours.resample or len(ours.parts) < 2:
        return found
    both = np.concatenate([ours.parts, theirs.parts])
    n = len(ours.parts)

    def gap(a: Numbers, b: Numbers, axis: int = -1) -> Numbers:
        a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
        return ours.combine(both[a].sum(-2)) - ours.combine(both[b].sum(-2))

    bounds = _bootstrap(lambda index: gap(index, index + n), n, confidence, seed, ours)
    if bounds is not None:
        found["low"], found["high"] = bounds
    if np.array_equal(ours.parts, theirs.parts):
        return {**found, "p": 1.0}
    test = stats.permutation_test(
        (np.arange(n), np.arange(n, 2 * n)), gap, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=_BATCH, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {**found, "p": float(test.pvalue)}


def _bootstrap(
    statistic: Callable[[Any], Numbers], n: int, confidence: float, seed: int, what: Measured
) -> tuple[float, float] | None:
    from scipy import stats

    if n < 2 or not what.resample or what.value is None:
        return None
    distribution = stats.bootstrap(
        (np.arange(n),), lambda index, axis=-1: statistic(np.moveaxis(index, axis, -1)), vectorized=True,
        n_resamples=RESAMPLES, batch=_BATCH, method="percentile", rng=np.random.default_rng(seed),
    ).bootstrap_distribution  # fmt: skip
    known = distribution[np.isfinite(distribution)]  # a resample may contain no prompt with a value
    if not len(known):
        return None
    tail = 100 * (1 - confidence) / 2
    return float(np.percentile(known, tail)), float(np.percentile(known, 100 - tail))


def _number(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def ratio(totals: Numbers) -> Numbers:
    """The first part divided by the second: a mean from a sum and a count; [..., 2] -> [...]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(totals[..., 0] / totals[..., 1])


def by_prompt(answers: Sequence[Answer], rows: Sequence[Sequence[float]]) -> tuple[Numbers, tuple[str, ...]]:
    """Add up the rows of each prompt: the sums [P, k] and the P prompt ids, in order of first appearance."""
    if not answers:
        return np.zeros((0, 1)), ()
    places: dict[str, int] = {}
    index = [places.setdefault(a.example.id, len(places)) for a in answers]
    values = np.asarray(rows, dtype=float).reshape(len(answers), -1)
    parts = np.zeros((len(places), values.shape[1]))
    np.add.at(parts, index, values)
    return parts, tuple(places)


def mean_of(name: str, answers: Sequence[Answer], values: Sequence[float | None], **shown: Any) -> Measured:
    """The mean of one value per answer; ``None`` is not counted."""
    rows = [(0.0, 0.0) if v is None else (float(v), 1.0) for v in values]
    parts, prompts = by_prompt(answers, rows)
    return Measured(name, parts, prompts, sum(v is not None for v in values), ratio, **shown)


class Metric(Component):
    """Computes numbers from answers.

    ``needs``: which values of :class:`Answer` it uses: ``text`` (a generated response), ``options`` (their
    log-likelihoods), ``tokens`` (statistics of the chosen tokens).
    ``needs_whole_set``: whether the number of a response depends on the other answers of the call.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    needs_whole_set: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """The metric's numbers.

        Raises:
            DataError: an example has no value that the metric compares with.
        """


METRICS: Registry[Metric] = Registry("metric", "cwdpo.metrics", Metric)


def reliability(measured: Measured) -> list[dict[str, float]]:
    """The rows of the reliability diagram of an ECE; empty bins are left out."""
    bins = measured.parts.shape[1] // 3
    count, confidence, correct = measured.parts.sum(0).reshape(3, bins)
    return [
        {
            "confidence": float(confidence[b] / count[b]),
            "accuracy": float(correct[b] / count[b]),
            "n": int(count[b]),
        }
        for b in range(bins)
        if count[b]
    ]


def references_of(answer: Answer) -> list[str]:
    """The true responses that a text metric compares with: the references, or chosen if there are none.

    Raises:
        DataError: the example has neither.
    """
    found = list(answer.example.references) or [answer.example.chosen.text]
    if not any(text.strip() for text in found):
        raise DataError(
            f"{answer.example.where or answer.example.id}: has neither 'references' nor 'chosen' to compare with"
        )
    return found
