"""The parts of a row of ``rounds.jsonl``: numbers of a round's negatives, and some of its pairs for the report."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.records import Completion, Example, ImageRef, VideoRef

FILE = "rounds.jsonl"
_SHOWN = 12
"""Number of pairs of a round that its row contains."""


def negatives_by_origin(rows: Sequence[EncodedExample]) -> dict[str, dict[str, float | None]]:
    """For each origin: number ``n`` and ``share`` of its negatives, and their average mean_logp under the reference.

    The latter is in nats per token. An example that occurs several times is counted once.
    """
    means: dict[str, list[float | None]] = defaultdict(list)
    for example in {e.id: e for e in rows}.values():
        for c in example.negatives:
            means[c.origin].append(c.reference_mean_logp)
    n = sum(map(len, means.values()))
    counted: dict[str, dict[str, float | None]] = {}
    for origin, values in sorted(means.items()):
        known = [v for v in values if v is not None]
        mean = sum(known) / len(known) if known else None
        counted[origin] = {"n": len(values), "share": len(values) / n, "reference_mean_logp": mean}
    return counted


def shown_pairs(examples: Sequence[Example], rng: random.Random, home: Path) -> list[dict[str, Any]]:
    """Some pairs chosen at random, the same number for each origin if there are enough."""
    by_origin: dict[str, list[tuple[Example, int]]] = defaultdict(list)
    for example in examples:
        for k, c in enumerate(example.rejected):
            by_origin[c.origin].append((example, k))
    shown: list[tuple[Example, int]] = []
    for origin in sorted(by_origin):
        pairs = by_origin[origin]
        shown += rng.sample(pairs, min(len(pairs), _SHOWN // len(by_origin)))
    return [
        {
            "id": e.id,
            "image": _place(e, home),
            **({"video": _path(e.videos[0], home)} if e.videos else {}),
            "chosen": e.chosen.text,
            "chosen_origin": e.chosen.origin,
            "rejected": e.rejected[k].text,
            "origin": e.rejected[k].origin,
            "kind": e.rejected[k].kind,
            **(
                {}
                if e.rejected[k].images is None
                else {"rejected_image": _rejected_image(e.rejected[k], home)}
            ),
            "made": {key: v for key, v in e.rejected[k].made.items() if isinstance(v, str | int | float)},
        }
        for e, k in shown
    ]


def _place(example: Example, home: Path) -> str | None:
    """Path of the first image."""
    return _path(example.images[0], home) if example.images else None


def _rejected_image(completion: Completion, home: Path) -> dict[str, Any] | None:
    """Path and edit of the first image of an image-side negative."""
    image = completion.images[0] if completion.images else None
    if image is None or image.path is None:
        return None
    return {"path": _path(image, home), **({} if image.edit is None else {"edit": asdict(image.edit)})}


def _path(image: ImageRef | VideoRef, home: Path) -> str | None:
    """The path of an image or a video; relative to the run folder if it is inside, so that the folder can be moved."""
    path = image.path
    if path is None:
        return None
    return str(path.relative_to(home) if path.is_relative_to(home) else path)
