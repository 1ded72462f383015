"""Wrong labels on purpose: a share of the pairs of a data set with chosen and rejected exchanged."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.lab.rows import store_rows

KIND = "flipped"
"""Kind of a negative that was the chosen response, so that weights and probes show it apart."""


def write_flipped(source: Path, out: Path, *, share: float, seed: int) -> dict[str, Any]:
    """Write the rows of a JSONL file of the embedded world with a share of them flipped, to ``out/train.jsonl``.

    A flipped row has its first negative as chosen, and its chosen response as the only negative, of kind
    :data:`KIND`. Which rows are flipped grows with the share: those of 0.1 are among those of 0.2.

    Returns:
        ``rows`` and ``flipped``, how many.

    Raises:
        DataError: a row without a negative of its own.
    """
    rows = read_jsonl(source)
    made = []
    flipped = 0
    for number, row in enumerate(rows, 1):
        if random.Random(f"flip/{seed}/{row['id']}").random() >= share:
            made.append(row)
            continue
        if not row.get("negatives"):
            raise DataError(
                f"{source}, row {number}: negatives: none, so that chosen has nothing to change places with"
            )
        made.append(_flipped(row))
        flipped += 1
    store_rows(source.parent, out, made)
    return {"rows": len(rows), "flipped": flipped}


def _flipped(row: dict[str, Any]) -> dict[str, Any]:
    (turn,) = row["chosen"]
    text = turn["content"][0]["text"]
    negative = row["negatives"][0]["text"]

    def said(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    return {
        **row,
        "chosen": said(negative),
        "rejected": said(text),
        "negatives": [{"text": text, "kind": KIND, "origin": row["negatives"][0].get("origin", "dataset")}],
        "gentle": [],
    }
