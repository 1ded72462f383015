"""From examples to rows that a stage can train on: encode, score with the reference, filter, calibrate.

Every road to a first step goes through here: a stage on fixed negatives, each round of a stage on sampled ones, and
the front for users of TRL.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import nn

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError
from cwdpo.models.sample import sample
from cwdpo.objectives.base import Objective
from cwdpo.records import Example
from cwdpo.stage.reference import stored_reference_pass
from cwdpo.stage.stage import Stage

logger = logging.getLogger("cwdpo")


def prepare(stage: Stage) -> list[EncodedExample]:
    """Rows of a stage whose negatives are fixed, and its objective calibrated.

    Raises:
        DataError: too many examples cannot be used, or none is left.
    """
    rows = keep_negatives(stage.objective, with_reference_values(stage, encode(stage, stage.examples)))
    kept = {row.id for row in rows}
    calibrate(stage, [e for e in stage.examples if e.id in kept])
    return rows


def encode(
    stage: Stage, examples: Sequence[Example], part: str = "", *, need_negative: bool | None = None
) -> list[EncodedExample]:
    """Encode examples; what cannot be used goes to ``problems.jsonl``.

    Args:
        part: of the stage, for ``problems.jsonl``.
        need_negative: leave out examples without a negative; default: as the objective needs.

    Raises:
        DataError: more than ``data.max_bad_fraction`` of them cannot be used, or none is left.
    """
    needed = stage.objective.needs_negatives if need_negative is None else need_negative
    if not examples:
        raise DataError(
            "no example is left to train on: the data has no row for this stage with "
            f"{'a negative' if needed else 'a response'}; look at data.stage1_fraction and negatives"
        )
    encoded, problems = stage.encoder.encode_all(examples, stage.negatives, require_negative=needed)
    fraction = stage.recipe.data.max_bad_fraction
    if len(problems) > fraction * len(examples) or not encoded:
        shown = "\n  ".join(problems[:5])
        raise DataError(
            f"{len(problems)} of {len(examples)} examples cannot be used, more than data.max_bad_fraction = "
            f"{fraction} allows; the first:\n  {shown}\nFix the rows, or raise the fraction"
        )
    stage.note_problems(problems, part)
    return encoded


def with_reference_values(
    stage: Stage, encoded: Sequence[EncodedExample], model: nn.Module | None = None
) -> list[EncodedExample]:
    """Rows with the reference's sums; unchanged if the objective uses none.

    Args:
        model: the reference; default: the stage's, which is the policy before it trains.
    """
    if not stage.objective.needs_reference:
        return list(encoded)
    stage.listener.phase(f"{stage.name}: reference pass over {len(encoded)} prompts")
    reference = model or stage.reference_model or stage.policy.model
    train = stage.recipe.train
    folder = Path(train.reference_cache) if train.reference_cache else None
    with stage.autocast(reference):
        return stored_reference_pass(
            reference, encoded, stage.run, batch_size=train.batch_size, bf16=train.bf16, folder=folder
        )


def keep_negatives(objective: Objective, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Leave out negatives that the objective filters, and prompts that lose all of theirs.

    Raises:
        DataError: nothing is left.
    """
    kept = []
    for example in examples:
        negatives = tuple(
            c
            for c in example.negatives
            if c.reference_mean_logp is None or objective.keeps(c.reference_mean_logp)
        )
        if negatives or not objective.needs_negatives:
            kept.append(replace(example, negatives=negatives))
    if not kept:
        raise DataError("the negative filter leaves no pair: lower the objective's filter_below")
    return kept


def calibrate(stage: Stage, prompts: Sequence[Example]) -> None:
    """Replace the ``auto`` settings of the objective in force, from samples of the reference.

    Values and the mean_logps that they come from are stored in the run; a resumed run uses those.
    """
    if not stage.objective.needs_calibration:
        return
    name = "calibration.json" if stage.name == "stage2" else f"calibration-{stage.name}.json"
    stored = stage.run.json(name).get("mean_logps") if stage.resume else None
    mean_logps = stored or reference_mean_logps(stage, prompts)
    stage.in_force.objective = stage.objective.calibrated(mean_logps)
    if not stored:
        stage.run.write_json(name, {**calibration_row(stage.objective, mean_logps), "mean_logps": mean_logps})


def calibration_row(objective: Objective, mean_logps: Sequence[float]) -> dict[str, float]:
    """The settings that calibration may find, and the number of samples."""
    return {**{name: getattr(objective, name) for name in objective.calibrates}, "n": len(mean_logps)}


def reference_mean_logps(stage: Stage, prompts: Sequence[Example]) -> list[float]:
    """mean_logp (nats per token) of samples that the reference draws for prompts drawn by the recipe's seed.

    All processes must cool alike to the last bit, so those of the first process count.
    """
    settings, seed = stage.recipe.calibration, stage.recipe.seed
    reference = stage.reference_model or stage.policy.model
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))  # files may be sorted
    repeated = [prompts[order[i % len(order)]] for i in range(settings.samples)]
    with stage.autocast(reference):
        samples = sample(
            reference, stage.encoder, repeated, max_new_tokens=settings.max_new_tokens, seed=seed
        )
    mean_logps = [round(s.mean_logp, 6) for s in samples if s.mean_logp is not None]
    return list(broadcast_object_list([mean_logps])[0])
