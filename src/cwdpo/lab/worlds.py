"""The embedded world's data for a comparison: training pictures by seed, one validation and one test set for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cwdpo.errors import DataError
from cwdpo.worlds.shapes import ShapesSettings, materialise

TEST_WORLD_SEED = 777
HELD_OUT_NEGATIVES = 4


def write_world(out: Path, world: ShapesSettings, seeds: Sequence[int], split: str) -> dict[str, str]:
    """Write training rows of each seed, and held-out rows of every kind of negative.

    Args:
        out: folder.
        world: sizes and shares; its seed shifts the training pictures, the held-out ones stay.
        seeds: one training set each.
        split: what counts as the test set: ``test``, or ``validation`` for tuning.

    Returns:
        Paths by ``train<seed>``, ``validation`` and ``test``.

    Raises:
        DataError: the world has no validation pictures, or none of ``split``.
    """
    held = world.model_copy(
        update={
            "seed": TEST_WORLD_SEED,
            "train": 0,
            "negatives_per_prompt": HELD_OUT_NEGATIVES,
            "shares": dict.fromkeys(world.shares, 1.0),
        }
    )
    for name in ("validation", split):
        if not getattr(world, name):
            raise DataError(f"data.world.{name} is 0: a comparison needs held-out pictures there")
    shared = materialise(held, out / "held-out")
    paths = {"validation": str(shared["validation"]), "test": str(shared[split])}
    for seed in seeds:
        own = world.model_copy(update={"seed": world.seed + seed, "validation": 0, "test": 0})
        paths[f"train{seed}"] = str(materialise(own, out / f"seed{seed}")["train"])
    return paths
