"""Label noise: exchanges chosen and rejected in a share of the pairs of a data set."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.lab.rows import said, store_rows

KIND = "flipped"
"""Kind of a negative that was the chosen response, so that weights and readings show it separately."""


def write_flipped(source: Path, out: Path, *, share: float, seed: int) -> dict[str, Any]:
    """Write the rows of a JSONL file of the embedded world to ``out/train.jsonl``, with a share of them flipped.

    In a flipped row the first negative becomes chosen, and the chosen response becomes the only negative, of kind
    :data:`KIND`. A larger share flips the rows of a smaller one and more.

    Returns:
        ``rows`` and ``flipped``: the number of rows, and of flipped rows.

    Raises:
        DataError: a row to flip has no negative.
    """
    rows = read_jsonl(source)
    made = []
    flipped = 0
    for number, row in enumerate(rows, 1):
        if random.Random(f"flip/{seed}/{row['id']}").random() >= share:
            made.append(row)
            continue
        if not row.get("negatives"):
            raise DataError(f"{source}, row {number}: negatives: there is none to exchange chosen with")
        made.append(_flipped(row))
        flipped += 1
    store_rows(source.parent, out, made)
    return {"rows": len(rows), "flipped": flipped}


def _flipped(row: dict[str, Any]) -> dict[str, Any]:
    (turn,) = row["chosen"]
    text = turn["content"][0]["text"]
    negative = row["negatives"][0]["text"]

    return {
        **row,
        "chosen": said(negative),
        "rejected": said(text),
        "negatives": [{"text": text, "kind": KIND, "origin": row["negatives"][0].get("origin", "dataset")}],
        "gentle": [],
    }
