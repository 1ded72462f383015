"""Calibrates the ``auto`` settings of an objective on samples of the reference model, until they are known well enough.

The samples are drawn in rounds. After each round a bootstrap says how far the settings may be off; the first round
after which that is little enough is the last one.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwdpo.clock import spent_on
from cwdpo.data.encode.encoded_rows import reference_means
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.models.sample import repeats, sample_several
from cwdpo.objectives.base import Objective
from cwdpo.records import Example
from cwdpo.stage.stage import Stage
from cwdpo.waiting import from_first

NEGATIVES = 1000
"""How many values stand for the negatives of a stage, where its objective calibrates on them."""
RESAMPLES = 1000
"""Resamples of the bootstrap."""
CONFIDENCE = 0.95

Intervals = Mapping[str, tuple[float, float]]
"""(low, high) of each calibrated setting, in its unit."""


@dataclass(frozen=True)
class Drawn:
    """Samples of the reference model.

    Attributes:
        mean_logps: of the samples, nats per token.
        prompts: how many different prompts they answer; 0 if they are read from the run folder.
        intervals: how well the settings are known by them.
    """

    mean_logps: list[float]
    prompts: int
    intervals: Intervals


def calibrate(
    stage: Stage,
    prompts: Sequence[Example],
    rows: Callable[[], Sequence[EncodedExample]] = tuple,
    *,
    sampled_share: float = 0.0,
) -> list[float]:
    """Calibrate the ``auto`` settings of the current objective with samples of the reference model.

    The settings, their intervals and the mean_logps of the samples are stored in the run folder; a resumed run uses the
    stored ones.

    Args:
        stage: the stage.
        prompts: what the reference answers.
        rows: gives rows with reference values; called if the objective calibrates on its negatives.
        sampled_share: share of the negatives that will be samples of the policy instead of negatives of ``rows``.

    Returns:
        The mean_logps of the samples, nats per token; empty if the objective needs no calibration.
    """
    objective = stage.objective
    if not objective.needs_calibration:
        return []
    name = "calibration.json" if stage.name == "stage2" else f"calibration-{stage.name}.json"
    stored = stage.run.json(name) if stage.resume else {}
    wanted = objective.calibrates_on_negatives and not stored.get("negatives")
    of_data = reference_means(rows())[1] if wanted else ()

    def negatives(mean_logps: Sequence[float]) -> list[float]:
        kept: list[float] = stored.get("negatives", [])
        if kept or not objective.calibrates_on_negatives:
            return kept
        return negative_mean_logps(of_data, mean_logps, sampled_share)

    if stored.get("mean_logps"):
        drawn = Drawn(stored["mean_logps"], 0, stored.get("interval", {}))
    else:
        drawn = draw(stage, prompts, lambda values: calibrated(objective, values, negatives(values)))
    on = negatives(drawn.mean_logps)
    stage.in_force.objective = calibrated(objective, drawn.mean_logps, on)
    stage.in_force.known = logged_intervals(drawn)
    if not stored.get("mean_logps"):
        settings = stage.recipe.calibration
        row = {
            **calibration_row(stage.objective, drawn.mean_logps),
            "interval": {key: [round(v, 6) for v in bounds] for key, bounds in drawn.intervals.items()},
            "drawn": {"prompts": drawn.prompts, "most": settings.samples, "error": settings.error},
            "mean_logps": drawn.mean_logps,
        }
        stage.run.write_json(name, row | ({"negatives": on} if on else {}))
    return drawn.mean_logps


def calibrated(objective: Objective, mean_logps: Sequence[float], negatives: Sequence[float]) -> Objective:
    """The objective with numbers for its ``auto`` settings."""
    return objective.calibrated(mean_logps, negatives) if negatives else objective.calibrated(mean_logps)


def logged_intervals(drawn: Drawn) -> dict[str, float]:
    """The intervals and the number of samples, for the rows of training metrics."""
    found = {
        f"calibration/{name}_{end}": round(value, 6)
        for name, bounds in drawn.intervals.items()
        for end, value in zip(("low", "high"), bounds, strict=True)
    }
    return {**found, "calibration/n": float(len(drawn.mean_logps))}


def negative_mean_logps(
    own: Sequence[float], samples: Sequence[float] = (), sampled_share: float = 0.0
) -> list[float]:
    """:data:`NEGATIVES` mean_logps (nats per token) that stand for the negatives of a stage under the reference.

    They are evenly spaced quantiles of the data's negatives (``own``) and of the samples, in the proportion of the two.
    """
    import numpy as np

    drawn = round(NEGATIVES * sampled_share) if len(own) else NEGATIVES * bool(samples)
    parts = ((own, (NEGATIVES - drawn) * bool(len(own))), (samples, drawn))
    found = [np.quantile(values, (np.arange(n) + 0.5) / n) for values, n in parts if n]
    return [round(float(v), 6) for part in found for v in part]


def calibration_row(objective: Objective, mean_logps: Sequence[float]) -> dict[str, Any]:
    """The calibrated settings and the number of samples, as a row to store."""
    return {**{name: getattr(objective, name) for name in objective.calibrates}, "n": len(mean_logps)}


def draw(stage: Stage, prompts: Sequence[Example], found: Callable[[Sequence[float]], Objective]) -> Drawn:
    """Sample the reference model in rounds, until the calibrated settings are known well enough.

    Prompts are taken in an order of the recipe's seed; when all were taken, from the first one again. All processes use
    the values of the first one, so that the settings, and whether another round is drawn, are the same to the last bit.

    Args:
        stage: the stage; see ``calibration`` of its recipe.
        prompts: what the reference answers.
        found: the calibrated objective for mean_logps of samples, nats per token.
    """
    settings, seed = stage.recipe.calibration, stage.recipe.seed
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))  # files may be sorted
    size = settings.samples if settings.error is None else settings.round
    groups: defaultdict[int, list[float]] = defaultdict(list)
    asked: Counter[str] = Counter()
    values: list[float] = []
    turn = 0  # of prompts; each gives `per_prompt` samples
    while True:
        most = min(size, settings.samples - len(values))
        turns = range(turn, turn + -(-most // settings.per_prompt))
        turn = turns.stop
        of = [t % len(order) for t in turns]
        drawn = _mean_logps(stage, [prompts[order[k]] for k in of], asked)
        for k, own in zip(of, drawn, strict=True):
            kept = own[: settings.samples - len(values)]
            groups[k] += kept
            values += kept
        # Once every prompt was asked, the prompts are no sample any more: only the responses are.
        clusters = list(groups.values()) if turn < len(order) else [[v] for v in values]
        known = _known(found, values, clusters, settings.error, seed)
        intervals, enough = from_first(known, "the intervals of the calibration")
        if enough or len(values) >= settings.samples:
            return Drawn(values, len(groups), intervals)


def _known(
    found: Callable[[Sequence[float]], Objective],
    values: Sequence[float],
    clusters: Sequence[Sequence[float]],
    error: float | None,
    seed: int,
) -> tuple[Intervals, bool]:
    intervals = bootstrap(found, clusters, seed)
    return intervals, error is not None and found(values).uncertainty(intervals) <= error


def bootstrap(
    found: Callable[[Sequence[float]], Objective], clusters: Sequence[Sequence[float]], seed: int = 0
) -> Intervals:
    """Percentile bootstrap intervals of the calibrated settings, over the prompts with all their samples.

    A setting that is the same in all resamples has no interval: it was given, or is at its limit.

    Args:
        found: the calibrated objective for mean_logps of samples.
        clusters: mean_logps by prompt; samples of a prompt resemble each other, so they are drawn together.
        seed: of the resamples.
    """
    import numpy as np

    drawn = np.random.default_rng(seed).integers(0, len(clusters), (RESAMPLES, len(clusters)))
    names = found([v for own in clusters for v in own]).calibrates
    rows = []
    for index in drawn.tolist():
        objective = found([v for k in index for v in clusters[k]])
        rows.append([float(getattr(objective, name)) for name in names])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.asarray(rows), [tail, 100 - tail], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True) if a < b}


def _mean_logps(stage: Stage, prompts: Sequence[Example], asked: Counter[str]) -> list[list[float]]:
    """For each prompt, the mean_logps (nats per token) of ``calibration.per_prompt`` samples of the reference model.

    Args:
        stage: the stage.
        prompts: what the reference answers.
        asked: how often each id was asked before, so that it gives other samples now; updated.
    """
    settings = stage.recipe.calibration
    reference = stage.reference_model or stage.policy.model
    with spent_on("calibration"), stage.autocast(reference):
        drawn = sample_several(
            reference, stage.encoder, prompts, settings.per_prompt, max_new_tokens=settings.max_new_tokens,
            batch_size=stage.recipe.evaluation.batch_size, seed=stage.recipe.seed, repeated=repeats(prompts, asked),
            together=True,
        )  # fmt: skip
    return [[round(s.mean_logp, 6) for s in own if s.mean_logp is not None] for own in drawn]
