"""Turns examples into encoded examples that a stage can train on: encode, score with the reference, filter, calibrate.

Stages with fixed negatives, each round of a stage with sampled negatives, and ``CWDPOTrainer`` all use these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from cwdpo.clock import spent_on
from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoding import encode_rows
from cwdpo.errors import DataError
from cwdpo.files.stored import select
from cwdpo.objectives.base import Objective
from cwdpo.records import Example
from cwdpo.stage.calibration import calibrate
from cwdpo.stage.encoded import stored_rows
from cwdpo.stage.reference import stored_reference_pass
from cwdpo.stage.stage import Stage

_Encoded = tuple[EncodedRows, list[str]]


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


def with_reference_values(
    stage: Stage, encoded: EncodedRows, model: nn.Module | None = None, folder: Path | None = None
) -> EncodedRows:
    """Add the reference model's log-likelihoods; if the objective uses no reference, the examples are unchanged.

    Args:
        stage: the stage.
        encoded: the examples.
        model: the reference model; default: the stage's, which is the policy before training.
        folder: of the stored values, unless the recipe names one; default: ``reference/`` in the run folder.
    """
    if not stage.objective.needs_reference:
        return encoded
    stage.listener.phase(f"{stage.name}: reference pass over {len(encoded)} prompts")
    reference = model or stage.reference_model or stage.policy.model
    train = stage.recipe.train
    folder = Path(train.reference_cache) if train.reference_cache else folder
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
