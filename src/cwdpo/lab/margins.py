"""Estimates reward margins, for objectives that use them as weights of pairs (madpo).

The reward model is the implicit one of a policy trained with DPO on the same pairs: its reward is ``beta`` times the
shift from the reference. DPO minimises the same Bradley-Terry loss as a reward model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.lab.rows import store_rows
from cwdpo.models.load import load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.scoring.pairs import reference_pass


def write_margins(
    policy: Path, reference: str, data: str, out: Path, *, beta: float, image_root: str | None = None
) -> dict[str, Any]:
    """Write the rows of ``data`` with ``made.reward_margin`` on every negative to ``out/train.jsonl``.

    Args:
        policy: folder of the model trained with DPO.
        reference: folder or hub id of the model at the start of its stage 2.
        data: a JSONL file.
        out: folder to write to; the images are linked into it.
        beta: beta of the DPO run, per nat.
        image_root: see ``data.image_root`` of recipes.

    Returns:
        ``rows``, ``pairs``, the ``mean`` margin, and ``right``: the share of margins above 0.

    Raises:
        DataError: the file is not JSONL, or has rows that cannot be used.
    """
    source = Path(data)
    if source.suffix != ".jsonl" or not source.is_file():
        raise DataError(f"{data}: margins are written into the rows of a .jsonl file; convert the data first")
    rows = read_jsonl(source)
    examples = read_examples(source, image_root=Path(image_root) if image_root else None).examples
    if len(rows) != len(examples):
        raise DataError(
            f"{data}: only {len(examples)} of {len(rows)} rows can be used; see `cwdpo validate {data}`"
        )
    scores = []
    for folder in (str(policy), reference):
        loaded = load_policy(ModelSettings(path=folder))
        encoder = loaded.encoder()
        encoded, problems = encoder.encode_all(examples, "rejected", require_negative=False)
        if problems:
            raise DataError(f"{data}: {problems[0]}")
        scores.append(reference_pass(loaded.model, encoded))
    margins: list[float] = []
    for row, example, now, then in zip(rows, examples, *scores, strict=True):
        found = _margins(now, then, beta)
        row["negatives"] = [
            {
                "text": c.text,
                "kind": c.kind,
                "origin": c.origin,
                "made": {**c.made, "reward_margin": found[ids]},
            }
            for c in example.rejected
            if (ids := encoder.completion_ids(example, c.text)) in found
        ]
        margins += found.values()
    store_rows(Path(image_root) if image_root else source.parent, out, rows)
    n = len(margins)
    return {
        "rows": len(rows),
        "pairs": n,
        "mean": sum(margins) / n if n else None,
        "right": sum(m > 0 for m in margins) / n if n else None,
    }


def _margins(now: EncodedExample, then: EncodedExample, beta: float) -> dict[tuple[int, ...], float]:
    """``beta`` times (shift of chosen - shift of the negative), by the negative's token ids."""
    shifts = []
    for a, b in zip((now.chosen, *now.negatives), (then.chosen, *then.negatives), strict=True):
        assert a.reference_sum_logp is not None
        assert b.reference_sum_logp is not None
        shifts.append(a.reference_sum_logp - b.reference_sum_logp)
    chosen, *rejected = shifts
    return {c.ids: round(beta * (chosen - s), 6) for c, s in zip(now.negatives, rejected, strict=True)}
