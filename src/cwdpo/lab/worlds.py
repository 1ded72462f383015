"""The embedded world's data for a comparison: training pictures by seed, held-out pictures that nothing trains on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cwdpo.errors import DataError
from cwdpo.files.reading import read_jsonl
from cwdpo.files.writing import write_text
from cwdpo.worlds.shapes import ShapesSettings, materialise, paraphrases

MAX_NEW_TOKENS = 40
"""Longest sampled caption of the world."""
HELD_OUT_SEED = 777
"""Of the test and validation pictures, unless a study names another."""
HELD_OUT_NEGATIVES = 4

Validation = Literal["shared", "own"]
"""Validation rows: the same for all seeds, with every kind of negative; or each seed's own, like its training rows."""
Rejected = Literal["long", "equal"]
"""What takes the place of each rejected caption; see :data:`REWRITES`."""


class WorldFiles(NamedTuple):
    """JSON-lines files of one seed."""

    train: Path
    validation: Path
    test: Path


def write_world(
    out: Path,
    world: ShapesSettings,
    seed: int,
    split: str,
    *,
    validation: Validation = "shared",
    rejected: Rejected | None = None,
    held_out_seed: int = HELD_OUT_SEED,
) -> WorldFiles:
    """Write training rows of a seed, and held-out rows with every kind of negative.

    Args:
        out: folder.
        world: sizes and shares; its seed shifts the training pictures, the held-out ones stay.
        seed: added to the world's.
        split: what counts as the test set: ``test``, or ``validation`` for tuning.
        validation: which pictures the training's own probes look at.
        rejected: a rewriting of the rejected captions in training and validation rows.
        held_out_seed: seed of the held-out pictures.

    Raises:
        DataError: the world has no validation pictures, or none of ``split``.
    """
    for name in ("validation", split):
        if not getattr(world, name):
            raise DataError(f"data.world.{name} is 0: a comparison needs held-out pictures there")
    held_out = {
        "seed": held_out_seed,
        "train": 0,
        "negatives_per_prompt": HELD_OUT_NEGATIVES,
        "shares": dict.fromkeys(world.shares, 1.0),
    }
    shared = materialise(world.model_copy(update=held_out), out / "held-out")
    kept = {} if validation == "own" else {"validation": 0}
    by_seed = materialise(
        world.model_copy(update={"seed": world.seed + seed, "test": 0, **kept}), out / f"seed{seed}"
    )
    files = WorldFiles(by_seed["train"], (shared | by_seed)["validation"], shared[split])
    if rejected is None:
        return files
    return WorldFiles(_rewritten(files.train, rejected), _rewritten(files.validation, rejected), files.test)


def _rewritten(source: Path, rejected: Rejected) -> Path:
    """The rows of ``source`` with one negative each, the rewritten one, in a file beside it: image paths still hold."""
    path = source.with_name(f"{source.stem}-{rejected}.jsonl")
    rows = []
    for row in read_jsonl(source):
        text = REWRITES[rejected](row, random.Random(row["id"]))
        negative = {"text": text, "kind": rejected, "origin": "dataset"}
        rows.append({**row, "rejected": text, "negatives": [negative]})
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _long(row: dict[str, Any], rng: random.Random) -> str:
    """The same negative with three more objects at its end."""
    text = row["negatives"][0]["text"].removesuffix(" .")
    choices = (("small", "large"), ("red", "blue", "green"), ("circle", "square", "ring"))
    more = " and ".join(f"a {' '.join(map(rng.choice, choices))}" for _ in range(3))
    return f"{text} and {more} ."


def _equal(row: dict[str, Any], rng: random.Random) -> str:
    """A paraphrase of the chosen caption: nothing is wrong with it."""
    return rng.choice(paraphrases(row["chosen"][0]["content"][0]["text"]))


REWRITES: dict[Rejected, Callable[[dict[str, Any], random.Random], str]] = {"long": _long, "equal": _equal}
