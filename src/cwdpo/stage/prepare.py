"""Turns examples into encoded examples that a stage can train on: encode, score with the reference, filter, calibrate.

Stages with fixed negatives, each round of a stage with sampled negatives, and ``CWDPOTrainer`` all use these functions.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import nn

from cwdpo.clock import spent_on
from cwdpo.data.encode.encoded_rows import EncodedRows, encode_rows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError
from cwdpo.files.stored import select
from cwdpo.models.sample import sample
from cwdpo.objectives.base import Objective
from cwdpo.records import Example
from cwdpo.stage.encoded import stored_rows
from cwdpo.stage.reference import stored_reference_pass
from cwdpo.stage.stage import Stage

logger = logging.getLogger("cwdpo")
_Encoded = tuple[EncodedRows, list[str]]
NEGATIVES = 1000
"""How many values stand for the negatives of a stage, where its objective calibrates on them."""


def prepare(stage: Stage) -> EncodedRows:
    """Encode the examples of a stage with fixed negatives, and calibrate its objective.

    Raises:
        DataError: too many examples cannot be used, or none is left.
    """
    encoded = _usable(stage, stage.examples, partial(stored_rows, stage), "", stage.objective.needs_negatives)
    rows = keep_negatives(stage.objective, with_reference_values(stage, encoded))
    calibrate(stage, select(stage.examples, rows.numbers), lambda: rows)
    return rows


def encode(
    stage: Stage, examples: Sequence[Example], part: str = "", *, need_negative: bool | None = None
) -> EncodedRows:
    """Encode examples; those that cannot be used are listed in ``problems.jsonl``.

    Args:
        stage: the stage.
        examples: the examples to encode.
        part: name of the part of the stage, for ``problems.jsonl``.
        need_negative: leave out examples without a negative; default: if the objective needs negatives.

    Raises:
        DataError: more than ``data.max_bad_fraction`` of them cannot be used, or none is left.
    """
    needed = stage.objective.needs_negatives if need_negative is None else need_negative
    encode_now = partial(encode_rows, stage.encoder, examples, stage.negatives)
    return _usable(stage, examples, encode_now, part, needed)


def _usable(
    stage: Stage, examples: Sequence[Example], rows: Callable[..., _Encoded], part: str, needed: bool
) -> EncodedRows:
    """The result of ``rows``, if enough of the examples are in it."""
    if not examples:
        raise DataError(
            "no example is left to train on: the data has no row for this stage with "
            f"{'a negative' if needed else 'a response'}; check data.stage1_fraction and negatives"
        )
    with spent_on("encoding"):
        encoded, problems = rows(require_negative=needed)
    fraction = stage.recipe.data.max_bad_fraction
    if len(problems) > fraction * len(examples) or not encoded:
        shown = "\n  ".join(problems[:5])
        raise DataError(
            f"{len(problems)} of {len(examples)} examples cannot be used, more than data.max_bad_fraction = "
            f"{fraction} allows; the first:\n  {shown}\nFix the rows, or raise the fraction"
        )
    stage.note_problems(problems, part)
    return encoded


def with_reference_values(stage: Stage, encoded: EncodedRows, model: nn.Module | None = None) -> EncodedRows:
    """Add the reference model's log-likelihoods; if the objective uses no reference, the examples are unchanged.

    Args:
        stage: the stage.
        encoded: the examples.
        model: the reference model; default: the stage's, which is the policy before training.
    """
    if not stage.objective.needs_reference:
        return encoded
    stage.listener.phase(f"{stage.name}: reference pass over {len(encoded)} prompts")
    reference = model or stage.reference_model or stage.policy.model
    train = stage.recipe.train
    folder = Path(train.reference_cache) if train.reference_cache else None
    with spent_on("reference pass"), stage.autocast(reference):
        scored = stored_reference_pass(
            reference, encoded, stage.run, batch_size=train.batch_size, bf16=train.bf16, folder=folder
        )
    assert isinstance(scored, EncodedRows)
    return scored


def keep_negatives(objective: Objective, rows: EncodedRows) -> EncodedRows:
    """Leave out the negatives that the objective filters, and the prompts that lose all their negatives.

    Raises:
        DataError: no pair is left.
    """
    kept = rows.filtered(objective.keeps, need=objective.needs_negatives)
    if not kept:
        raise DataError("the negative filter leaves no pair: lower the objective's filter_below")
    return kept


def calibrate(
    stage: Stage,
    prompts: Sequence[Example],
    rows: Callable[[], Sequence[EncodedExample]] = tuple,
    *,
    sampled_share: float = 0.0,
) -> list[float]:
    """Calibrate the ``auto`` settings of the current objective with samples of the reference model.

    The settings and the mean_logps of the samples are stored in the run folder; a resumed run uses the stored ones.

    Args:
        prompts: what the reference answers.
        rows: gives rows with reference values; called if the objective calibrates on its negatives.
        sampled_share: share of the negatives that will be samples of the policy instead of negatives of ``rows``.

    Returns:
        The mean_logps of the samples, nats per token; empty if the objective needs no calibration.
    """
    if not stage.objective.needs_calibration:
        return []
    name = "calibration.json" if stage.name == "stage2" else f"calibration-{stage.name}.json"
    stored = stage.run.json(name) if stage.resume else {}
    mean_logps: list[float] = stored.get("mean_logps") or reference_mean_logps(stage, prompts)
    negatives: list[float] = stored.get("negatives", [])
    if stage.objective.calibrates_on_negatives and not negatives:
        negatives = negative_mean_logps(rows(), mean_logps, sampled_share)
    given = (mean_logps, negatives) if negatives else (mean_logps,)
    stage.in_force.objective = stage.objective.calibrated(*given)
    if not stored.get("mean_logps"):
        row = {**calibration_row(stage.objective, mean_logps), "mean_logps": mean_logps}
        stage.run.write_json(name, row | ({"negatives": negatives} if negatives else {}))
    return mean_logps


def negative_mean_logps(
    rows: Sequence[EncodedExample], samples: Sequence[float] = (), sampled_share: float = 0.0
) -> list[float]:
    """:data:`NEGATIVES` mean_logps (nats per token) that stand for the negatives of a stage under the reference.

    They are evenly spaced quantiles of the rows' negatives and of the samples, in the proportion of the two.
    """
    import numpy as np

    own = [c.reference_mean_logp for row in rows for c in row.negatives if c.reference_mean_logp is not None]
    drawn = round(NEGATIVES * sampled_share) if own else NEGATIVES * bool(samples)
    parts = ((own, (NEGATIVES - drawn) * bool(own)), (samples, drawn))
    found = [np.quantile(values, (np.arange(n) + 0.5) / n) for values, n in parts if n]
    return [round(float(v), 6) for part in found for v in part]


def calibration_row(objective: Objective, mean_logps: Sequence[float]) -> dict[str, float]:
    """The calibrated settings and the number of samples, as a row to store."""
    return {**{name: getattr(objective, name) for name in objective.calibrates}, "n": len(mean_logps)}


def reference_mean_logps(stage: Stage, prompts: Sequence[Example]) -> list[float]:
    """mean_logp (nats per token) of samples of the reference model, for prompts chosen with the recipe's seed.

    All processes use the values of the first one, so that floor and tau are the same to the last bit.
    """
    settings, seed = stage.recipe.calibration, stage.recipe.seed
    reference = stage.reference_model or stage.policy.model
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))  # files may be sorted
    repeated = [prompts[order[i % len(order)]] for i in range(settings.samples)]
    with spent_on("calibration"), stage.autocast(reference):
        samples = sample(
            reference, stage.encoder, repeated, max_new_tokens=settings.max_new_tokens,
            batch_size=stage.recipe.evaluation.batch_size, seed=seed,
        )  # fmt: skip
    mean_logps = [round(s.mean_logp, 6) for s in samples if s.mean_logp is not None]
    return list(broadcast_object_list([mean_logps])[0])
