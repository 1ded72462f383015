"""The embedded world's data for a study: training images that depend on the seed, and held-out images."""

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
"""Largest number of tokens in a sampled caption of the world."""
HELD_OUT_SEED = 777
"""Seed of the test and validation images, unless a study sets another."""
HELD_OUT_NEGATIVES = 4

Validation = Literal["shared", "own"]
"""Validation rows: the same for all seeds, with all kinds of negatives; or each seed's own, like its training rows."""
Rejected = Literal["long", "equal"]
"""How each rejected caption is replaced, see :data:`REWRITES`."""


class WorldFiles(NamedTuple):
    """The JSONL files of one seed."""

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
    """Write the training rows of a seed, and held-out rows with all kinds of negatives.

    Args:
        out: folder to write to.
        world: sizes and shares; its seed changes the training images, not the held-out ones.
        seed: added to the world's seed.
        split: the split used as test set: ``test``, or ``validation`` for tuning.
        validation: which images the probes use.
        rejected: how to replace the rejected captions in training and validation rows.
        held_out_seed: seed of the held-out images.

    Raises:
        DataError: the world has no validation images, or none of ``split``.
    """
    for name in ("validation", split):
        if not getattr(world, name):
            raise DataError(f"data.world.{name} is 0: a study needs held-out images there")
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
    """Write the rows of ``source`` with one rewritten negative each, next to it, so that image paths stay valid."""
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
    """A paraphrase of the chosen caption, so the rejected caption is right too."""
    return rng.choice(paraphrases(row["chosen"][0]["content"][0]["text"]))


REWRITES: dict[Rejected, Callable[[dict[str, Any], random.Random], str]] = {"long": _long, "equal": _equal}
