"""Plans a study as cells in waves: shared data, shared first stages, variants, and variants that need another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cwdpo.config import Recipe, load_recipe, parse_recipe, read_tree
from cwdpo.errors import DataError
from cwdpo.lab.cell import CellJob, StageOfCell
from cwdpo.lab.spec import BestOf, Study, Variant, overrides_of
from cwdpo.lab.worlds import HELD_OUT_SEED, WorldFiles, write_world
from cwdpo.negatives.settings import NegativeSettings

BASE = "base"
"""Key of the cell that measures the starting model."""
_PLAIN = NegativeSettings()
_ROUNDS = (
    "on_policy_fraction", "rounds", "on_policy_chosen", "easy_cut", "hard_cut", "recalibrate", "sampler", "judge",
)  # fmt: skip


@dataclass
class Plan:
    """The cells of a study by key, grouped into waves that run one after another."""

    data: dict[str, CellJob] = field(default_factory=dict)
    flipped: dict[str, CellJob] = field(default_factory=dict)
    stage1: dict[str, CellJob] = field(default_factory=dict)
    cells: dict[str, CellJob] = field(default_factory=dict)
    margins: dict[str, CellJob] = field(default_factory=dict)
    late: dict[str, CellJob] = field(default_factory=dict)

    def job(self, key: str) -> CellJob:
        """The cell with a key."""
        return next(job for wave in self.waves for job in wave if job.key == key)

    @property
    def waves(self) -> list[list[CellJob]]:
        """The waves in order; the cells of a wave can run in parallel."""
        parts = (self.data, self.flipped, self.stage1, self.cells, self.margins, self.late)
        return [list(part.values()) for part in parts if part]


@dataclass(frozen=True)
class Asked:
    """One cell to plan: its key, variant, overrides and seed; ``teacher``: key of the cell that gives its margins."""

    key: str
    variant: str
    overrides: tuple[str, ...]
    seed: int
    teacher: str | None = None


def checked_tree(path: Path) -> dict[str, Any]:
    """Read a recipe file as a tree, and check it."""
    load_recipe(path)
    return read_tree(path)


def asked(study: Study, seeds: Sequence[int], chosen: Mapping[str, Sequence[str]]) -> list[Asked]:
    """Every variant at each of its seeds."""
    return [
        Asked(f"{name}-seed{seed}", name, tuple(overrides_of(study, name, chosen)), seed)
        for name in study.variants
        for seed in study.seeds(name, seeds)
    ]


def plan(
    out: Path,
    tree: Mapping[str, Any],
    study: Study,
    wanted: Sequence[Asked],
    *,
    split: str,
    test: Path | None,
) -> Plan:
    """Plan the wanted cells and the jobs that they need.

    Cells with the same first stage and seed share one run of it.

    Args:
        out: the study's folder.
        tree: the recipe.
        study: the study.
        wanted: the cells.
        split: the split of the embedded world to evaluate on.
        test: the test set for other data.

    Raises:
        RecipeError: a variant's overrides do not fit the recipe.
        DataError: there is no test set.
    """
    planned = Plan()
    sources = _Sources(out, study, split, test, planned)
    if study.base:
        first = wanted[0]
        recipe = parse_recipe(tree, [*study.common, f"seed={first.seed}"], where=f"study {study.name}")
        recipe, held = sources.with_data(recipe, first.seed)
        planned.cells[BASE] = CellJob(
            BASE, recipe.model_copy(update={"name": BASE}), out / "cells" / BASE, held, "base", study.metrics,
            judge=study.judge, decodings=study.decodings,
        )  # fmt: skip
    for one in sorted(wanted, key=lambda one: study.variants[one.variant].margins_from is not None):
        variant = study.variants[one.variant]
        recipe = parse_recipe(tree, [*one.overrides, f"seed={one.seed}"], where=f"variant {one.variant}")
        recipe, held = sources.with_data(recipe, one.seed, variant)
        _add(planned, out, one, recipe.model_copy(update={"name": one.key}), held, study)
    return planned


def _add(planned: Plan, out: Path, one: Asked, recipe: Recipe, test: Path, study: Study) -> None:
    """Add the cell of a variant, and the first stage and margins that it needs, if they are not planned yet."""
    stage: StageOfCell = "stage2" if recipe.stage2.enabled else "base"
    options = {"trace": True} if study.analysis else {}
    cell = CellJob(
        one.key,
        recipe,
        out / "cells" / one.key,
        test,
        stage,
        study.metrics,
        options,
        decodings=study.decodings,
        judge=study.judge,
    )
    if recipe.stage1.enabled:
        neutral = _first_stage(recipe)
        key = "stage1-" + _digest(neutral.to_yaml())
        job = CellJob(key, neutral, out / "cells" / key, test, "stage1", study.metrics)
        planned.stage1.setdefault(key, job)
        model = recipe.model.model_copy(update={"path": str(job.folder / "model")})
        cell = replace(cell, recipe=recipe.model_copy(update={"model": model}), first=job.folder)
    margins = study.variants[one.variant].margins_from
    if margins is None:
        planned.cells[one.key] = cell
        return
    teacher = planned.cells[one.teacher or f"{margins}-seed{one.seed}"]
    if not teacher.options.get("keep_model"):
        teacher = replace(teacher, options={**teacher.options, "keep_model": True})
        planned.cells[teacher.key] = teacher
    key = f"margins-{teacher.key}"
    planned.margins.setdefault(
        key,
        CellJob(
            key, teacher.recipe, out / "cells" / key, test, "margins", study.metrics,
            {"policy": str(teacher.folder / "model"), "reference": teacher.recipe.model.path},
        ),
    )  # fmt: skip
    path = str(out / "cells" / key / "train.jsonl")
    data = cell.recipe.data.model_copy(update={"path": path, "image_root": None})
    planned.late[one.key] = replace(cell, recipe=cell.recipe.model_copy(update={"data": data}))


def _first_stage(recipe: Recipe) -> Recipe:
    """The recipe with neutral values for settings that only stage 2 uses, so that equal first stages compare equal."""
    neutral = recipe.stage2.model_copy(
        update={
            "enabled": True,
            "objective": {"name": "dpo"},
            "learning_rate": 1e-6,
            "steps": 1,
            "epochs": 1.0,
        }
    )
    negatives = recipe.negatives.model_copy(update={key: getattr(_PLAIN, key) for key in _ROUNDS})
    update: dict[str, Any] = {"name": "stage1", "stage2": neutral, "negatives": negatives}
    update["calibration"] = Recipe.model_fields["calibration"].default
    if not recipe.stage1.build().needs_reference:  # without a reference there is no curriculum
        update["curriculum"] = {"name": "steady"}
    return recipe.model_copy(update=update)


class _Sources:
    """The data of each seed: the world is written once per seed; sampled and flipped data are cells of their own."""

    def __init__(self, out: Path, study: Study, split: str, test: Path | None, planned: Plan) -> None:
        self.out, self.study, self.split, self.test, self.planned = out, study, split, test, planned
        self._worlds: dict[str, WorldFiles] = {}

    def with_data(self, recipe: Recipe, seed: int, variant: Variant | None = None) -> tuple[Recipe, Path]:
        """The recipe with the data of a seed, and the test set."""
        data, rejected = recipe.data, variant.rejected if variant else None
        held = self.test or (Path(self.study.test) if self.study.test else None)
        if data.world is None:
            if held is None:
                raise DataError(
                    "a study needs a test set that is not used for tuning: give --test FILE, or 'test:' in the study; "
                    "only the embedded world (data.world) has its own"
                )
            if rejected or self.study.validation == "own" or (variant and variant.flipped):
                raise DataError(
                    f"study {self.study.name}: 'rejected', 'flipped' and 'validation: own' need the embedded world: "
                    "leave them out, or use a recipe with data.world"
                )
            return recipe, held
        own, fresh = self.study.validation, self.study.held_out_seed
        marks = ("" if own == "shared" else own) + ("" if fresh == HELD_OUT_SEED else f"held-out {fresh}")
        key = _digest(data.world.model_dump_json() + marks)
        name = f"{key}-{self.split}-{seed}-{rejected}"
        if name not in self._worlds:
            self._worlds[name] = write_world(
                self.out / "data" / key, data.world, seed, self.split,
                validation=own, rejected=rejected, held_out_seed=fresh,
            )  # fmt: skip
        files = self._worlds[name]
        update = {"world": None, "path": str(files.train), "validation_path": str(files.validation)}
        recipe = recipe.model_copy(update={"data": data.model_copy(update=update)})
        if self.study.data is not None:
            recipe = self._sampled(recipe, seed, self.study.data, files.test)
        if variant is not None and variant.flipped:
            recipe = self._flipped(recipe, seed, variant.flipped, files.test)
        return recipe, held or files.test

    def _sampled(self, recipe: Recipe, seed: int, settings: BestOf, test: Path) -> Recipe:
        """The recipe with the preference set that a cell of an earlier wave samples."""
        key = f"data-{_digest(settings.model_dump_json() + str(recipe.data.path) + recipe.model.path)}-seed{seed}"
        job = CellJob(
            key, self._plain(key, recipe, seed), self.out / "cells" / key, test, "best_of", self.study.metrics,
            settings.model_dump(),
        )  # fmt: skip
        return self._read_from(recipe, self.planned.data.setdefault(key, job))

    def _flipped(self, recipe: Recipe, seed: int, share: float, test: Path) -> Recipe:
        """The recipe with the rows of which a cell of an earlier wave flips a share."""
        key = f"flipped-{_digest(f'{share}{recipe.data.path}')}-seed{seed}"
        job = CellJob(
            key, self._plain(key, recipe, seed), self.out / "cells" / key, test, "flipped", self.study.metrics,
            {"share": share},
        )  # fmt: skip
        return self._read_from(recipe, self.planned.flipped.setdefault(key, job))

    @staticmethod
    def _plain(key: str, recipe: Recipe, seed: int) -> Recipe:
        """The recipe of a cell that makes data; the same for all variants."""
        model = {"path": recipe.model.path, "device": recipe.model.device}
        return parse_recipe({"name": key, "seed": seed, "data": {"path": recipe.data.path}, "model": model})

    @staticmethod
    def _read_from(recipe: Recipe, job: CellJob) -> Recipe:
        data = recipe.data.model_copy(update={"path": str(job.folder / "data" / "train.jsonl")})
        return recipe.model_copy(update={"data": data})


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
