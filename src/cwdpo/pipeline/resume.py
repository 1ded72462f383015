"""Starts or resumes a run: locks the folder, cleans up after a kill, and handles changes of the recipe."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwdpo.config import Recipe, code_names, parse_recipe, read_tree
from cwdpo.copies import refuse_copy
from cwdpo.errors import CwdpoError, FileError, RecipeError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.writing import write_text
from cwdpo.overrides import flat
from cwdpo.rundir import RunDir
from cwdpo.stage.streaming import FILE as WINDOWS
from cwdpo.waiting import from_first

ABSENT = "(absent)"
# These keys are used after training only: if they change, the trained model stays valid.
_AFTER_TRAINING = ("name", "evaluation.")
# A run gives the same with any value.
_WITHOUT_EFFECT = ("train.dataloader_workers", "data.image_cache", "data.image_cache_gb")


def start_run(run: RunDir, recipe: Recipe, *, resume: bool = False, accept_changes: bool = False) -> None:
    """Lock the run's folder and store the recipe. Every process calls this; only the one that writes does the work.

    Args:
        run: the run folder.
        recipe: the recipe of this start.
        resume: continue the run in the folder, if there is one.
        accept_changes: continue although the recipe or files were changed.

    Raises:
        RunDirError: another process works in the folder, it contains a run and ``resume`` is not set, or it is a copy.
        FileError: a file differs from its stored checksum, and ``accept_changes`` is not set.
        RecipeError: the recipe differs from the run's, and ``accept_changes`` is not set.
    """
    trouble: list[Exception | None] = [None]
    if run.writes:
        try:
            run.lock()
            refuse_copy(run.path)
            _enter(run, recipe, resume, accept_changes)
        except (CwdpoError, OSError) as error:
            run.unlock()
            trouble = [error]
    # All processes must raise the error; else the others would wait for the first process without end.
    found = from_first(trouble[0], "opening the run folder")
    if found is not None:
        raise found


def _enter(run: RunDir, recipe: Recipe, resume: bool, accept_changes: bool) -> None:
    run.create(resume=resume)
    path = run.path / "recipe.yaml"
    text = recipe.to_yaml()
    changed = recipe_changes(path, recipe) if resume and path.is_file() else {}
    if changed and not accept_changes:
        lines = "".join(f"\n  {key}: {old} -> {new}" for key, (old, new) in changed.items())
        raise RecipeError(
            f"{path}: the run was started with another recipe:{lines}\nGive the old values; or continue with the "
            f"new ones with --accept-changes (the old recipe is kept as {_numbered(path).name}); or start a new run in "
            "another --out"
        )
    damaged = run.changes() if resume else []
    if damaged and not accept_changes:
        raise FileError(
            f"{run.path}: changed since the run wrote it: {'; '.join(damaged)}: restore it from a copy, or continue "
            "with the changed files with --accept-changes"
        )
    if damaged:
        (run.path / CHECKSUMS).unlink()
    if resume:
        run.recover()
        run.drop_stages("problems.jsonl", {"read", "negatives"})
        run.drop_stages("notes.jsonl", {"read"})
        if accept_changes:
            _forget_rows(run)
    if changed:
        keep_old(run, changed)
    write_text(path, text)
    run.write_environment()


def _forget_rows(run: RunDir) -> None:
    """Let a run with ``data.streaming`` continue with other rows than those it has read."""
    rows = [{**row, "digest": None, "contents": None} for row in run.rows(WINDOWS)]
    if rows:
        run.write_text(WINDOWS, "".join(json.dumps(row) + "\n" for row in rows))


def recipe_changes(path: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys with different values: (stored, now). Keys that the stored recipe lacks have their defaults.

    Keys that change nothing in what a run gives are not compared.

    Raises:
        RecipeError: the stored recipe is not YAML.
    """
    try:
        tree = read_tree(path)
    except RecipeError as error:
        raise RecipeError(f"{error}: restore the run's recipe from a copy, or start a new run") from None
    # Two kinds of recipes are compared unparsed: those that name code (the file may be somebody else's, and parsing
    # imports the code), and those of another version that cannot be parsed.
    if not code_names(tree):
        with contextlib.suppress(RecipeError, TypeError, AttributeError):
            tree = parse_recipe(tree, where=str(path)).model_dump(mode="json")
    old, new = flat(tree), recipe.flat()
    return {
        key: (old.get(key, ABSENT), new.get(key, ABSENT))
        for key in dict.fromkeys((*old, *new))
        if old.get(key, ABSENT) != new.get(key, ABSENT) and key not in _WITHOUT_EFFECT
    }


def keep_old(run: RunDir, changed: Mapping[str, Any]) -> None:
    """Rename the old recipe and the results that the new recipe makes again: ``recipe.1.yaml``, ...

    Checkpoints are kept: training continues from the last one.
    """
    recipe = run.path / "recipe.yaml"
    kept = _numbered(recipe)
    number = kept.stem.rsplit(".", 1)[1]
    write_text(kept, recipe.read_text(encoding="utf-8"))
    names = ["samples.jsonl", "summary.json", "report.html"]
    if any(not key.startswith(_AFTER_TRAINING) for key in changed):
        names.insert(0, "model")
    for name in names:
        path = run.path / name
        if path.exists():
            run.forget(name)
            os.rename(path, path.with_name(f"{path.stem}.{number}{path.suffix}"))


def _numbered(recipe: Path) -> Path:
    number = 1
    while (path := recipe.with_name(f"recipe.{number}.yaml")).exists():
        number += 1
    return path
