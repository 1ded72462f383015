"""Turns examples into encoded examples that a stage can train on: encode, score with the reference, filter, calibrate.

Stages with fixed negatives, each round of a stage with sampled negatives, and ``CWDPOTrainer`` all use these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from cwdpo.clock import spent_on
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError
from cwdpo.objectives.base import Objective
from cwdpo.records import Example
from cwdpo.stage.calibration import calibrate
from cwdpo.stage.reference import stored_reference_pass
from cwdpo.stage.stage import Stage


def prepare(stage: Stage) -> list[EncodedExample]:
    """Encode the examples of a stage with fixed negatives, and calibrate its objective.

    Raises:
        DataError: too many examples cannot be used, or none is left.
    """
    rows = keep_negatives(stage.objective, with_reference_values(stage, encode(stage, stage.examples)))
    kept = {row.id for row in rows}
    calibrate(stage, [e for e in stage.examples if e.id in kept], lambda: rows)
    return rows


def encode(
    stage: Stage, examples: Sequence[Example], part: str = "", *, need_negative: bool | None = None
) -> list[EncodedExample]:
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
    if not examples:
        raise DataError(
            "no example is left to train on: the data has no row for this stage with "
            f"{'a negative' if needed else 'a response'}; check data.stage1_fraction and negatives"
        )
    with spent_on("encoding"):
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
    """Add the reference model's log-likelihoods; if the objective uses no reference, the examples are unchanged.

    Args:
        stage: the stage.
        encoded: the examples.
        model: the reference model; default: the stage's, which is the policy before training.
    """
    if not stage.objective.needs_reference:
        return list(encoded)
    stage.listener.phase(f"{stage.name}: reference pass over {len(encoded)} prompts")
    reference = model or stage.reference_model or stage.policy.model
    train = stage.recipe.train
    folder = Path(train.reference_cache) if train.reference_cache else None
    with spent_on("reference pass"), stage.autocast(reference):
        return stored_reference_pass(
            reference, encoded, stage.run, batch_size=train.batch_size, bf16=train.bf16, folder=folder
        )


def keep_negatives(objective: Objective, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Leave out the negatives that the objective filters, and the prompts that lose all their negatives.

    Raises:
        DataError: no pair is left.
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
