"""``cwdpo init``: a recipe for a model, a data set and a GPU; no weights are loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.config import parse_recipe
from cwdpo.errors import DataError, RecipeError
from cwdpo.models.checkpoint import check_folder
from cwdpo.models.load import EMBEDDED, load_processor
from cwdpo.models.packages import check_packages
from cwdpo.models.settings import ModelSettings
from cwdpo.pipeline.first_recipe.decide import (
    Asked,
    after_fitting,
    before_fitting,
    image_limit,
    lengths,
    prompts_of_a_step,
)
from cwdpo.pipeline.first_recipe.fitting import Fitted, Tune, fitted
from cwdpo.pipeline.first_recipe.rows import READ, Rows, look_at_rows
from cwdpo.pipeline.first_recipe.text import Decision, as_tree, recipe_text
from cwdpo.pipeline.planning.gpus import in_units
from cwdpo.pipeline.planning.reading import read_run
from cwdpo.pipeline.planning.run import Hardware

LEAST_ROWS = 8
ENCODED = 128
"""Most rows of a stage to encode."""
ORDER = (
    "name",
    "model",
    "data",
    "negatives",
    "stage1",
    "stage2",
    "train",
    "calibration",
    "probes",
    "evaluation",
    "stop",
)


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe, with what it was decided from.

    Attributes:
        text: the file.
        decisions: its keys, and why they have these values.
        rows: what was found in the data.
        found: the way that fits, and what was tried.
        hardware: the GPUs.
        sharded: whether it is for FSDP2.
    """

    text: str
    decisions: tuple[Decision, ...]
    rows: Rows
    found: Fitted
    hardware: Hardware

    @property
    def sharded(self) -> bool:
        """Whether it is for FSDP2."""
        return self.found.way.sharded

    def to_json(self) -> dict[str, Any]:
        """Decisions, rows, and memory in bytes."""
        memory = self.found.memory
        return {
            "decisions": [{"key": d.key, "value": d.value, "why": d.why} for d in self.decisions],
            "rows": {
                "format": self.rows.format, "read": self.rows.read, "bad": self.rows.bad, "usable": self.rows.rows,
                "rejected": self.rows.rejected, "words_in_common": self.rows.alike,
            },
            "memory": {
                "parts": dict(memory.parts), "total": memory.total, "usable": self.hardware.gpu.usable,
                "gpu": self.hardware.gpu.name, "gpus": self.hardware.gpus,
            },
            "tried": [
                {"way": t.way.name, "prompts": t.prompts, "bytes": t.size, "fits": t.fits} for t in self.found.tried
            ],
        }  # fmt: skip


def first_recipe(
    asked: Asked, hardware: Hardware, tune: Tune = "lora", say: Callable[[str], None] = lambda text: None
) -> FirstRecipe:
    """Look at rows and model, and decide.

    Args:
        asked: model, data and objective.
        hardware: the GPUs.
        tune: what is trained, if that fits.
        say: is told what is done.

    Raises:
        CwdpoError: the data cannot be read or are too few, the model is not there or cannot be planned, the objective
            is unknown, or nothing fits.
    """
    if asked.model == "init":
        raise RecipeError(
            "--model init makes a model of random weights: name a folder or a hub id (owner/name); for a model of your "
            "own captions see `cwdpo recipe show photos`"
        )
    settings = ModelSettings(path=asked.model)
    if asked.model != "embedded":
        check_folder(asked.model, weights=False)
        check_packages(settings, weights=False)
    say(f"reading {asked.data}")
    rows = look_at_rows(asked.data)
    if rows.rows < LEAST_ROWS:
        raise DataError(
            f"{asked.data}: {rows.rows} usable rows are too few for two stages and a held-out part: take at least "
            f"{LEAST_ROWS}, with images of their own"
        )
    source = str(EMBEDDED) if asked.model == "embedded" else asked.model
    options = image_limit(load_processor(source, settings))
    begun = before_fitting(asked, rows, options, hardware.gpus)
    tree = as_tree(begun)
    tree["data"] |= {"limit": READ, "max_bad_fraction": 1.0}
    tree["stage1"], tree["stage2"]["learning_rate"] = {"objective": "sft"}, 1e-5
    tree["train"] = {"batch_size": prompts_of_a_step(rows, hardware.gpus)}
    say("encoding rows")
    with tempfile.TemporaryDirectory() as folder:
        recipe, config, data = read_run(parse_recipe(tree, where="init"), ENCODED, Path(folder))
        say("looking for what fits")
        found = fitted(config, recipe, data.stages, hardware, tune)
        sizes = lengths([row for stage in data.stages for row in stage.sample])
    decisions = _sorted([*begun, *after_fitting(rows, hardware, found, sizes)])
    text = recipe_text(_head(asked, hardware, found), decisions)
    parse_recipe(as_tree(decisions), where="init")
    return FirstRecipe(text, decisions, rows, found, hardware)


def _sorted(decisions: list[Decision]) -> tuple[Decision, ...]:
    """By section, in the order of a recipe; keys of a section keep theirs."""
    return tuple(sorted(decisions, key=lambda d: ORDER.index(d.key.partition(".")[0])))


def _head(asked: Asked, hardware: Hardware, found: Fitted) -> list[str]:
    return [
        f"{asked.model} on {hardware.gpus} x {hardware.gpu.name}: {found.way.name}, "
        f"{in_units(found.memory.total)} of {hardware.gpu.memory_gib:g} GiB.",
        "Written by cwdpo init from rows of the data and the model's configuration. Every key: docs/recipes.md.",
    ]
