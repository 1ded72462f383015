"""How a run starts or goes on: the lock, leftovers of a kill, and changes of the recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from cwdpo.config import Recipe, code_names, parse_recipe, read_tree
from cwdpo.errors import CwdpoError, FileError, RecipeError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.writing import write_text
from cwdpo.rundir import RunDir

ABSENT = "(absent)"
# What these keys say is used after training only: the trained model stays as it is.
_AFTER_TRAINING = ("name", "evaluation.")


def start_run(run: RunDir, recipe: Recipe, *, resume: bool = False, accept_changes: bool = False) -> None:
    """Lock the run's folder and store the recipe; every process calls this, the one that writes acts.

    Args:
        resume: continue the run in the folder, if there is one.
        accept_changes: go on with a recipe that differs from the stored one.

    Raises:
        RunDirError: another process works in the folder, or it holds a run and ``resume`` is not set.
        FileError: a file that it goes on from is not what the run recorded, and ``accept_changes`` is not set.
        RecipeError: the recipe differs from the run's, and ``accept_changes`` is not set.
    """
    trouble: list[Exception | None] = [None]
    if run.writes:
        try:
            run.lock()
            _enter(run, recipe, resume, accept_changes)
        except (CwdpoError, OSError) as error:
            run.unlock()
            trouble = [error]
    # The others would wait for the first process for ever.
    found = broadcast_object_list(trouble)[0]
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
            f"{path}: the run was started with another recipe:{lines}\nGive the old values; or go on with the "
            f"new ones by --accept-changes (the old recipe is kept as {_numbered(path).name}); or start a new run in "
            "another --out"
        )
    damaged = run.changes() if resume else []
    if damaged and not accept_changes:
        raise FileError(
            f"{run.path}: not as the run left it: {'; '.join(damaged)}: restore it from a copy, or go on with what is "
            "there by --accept-changes"
        )
    if damaged:
        (run.path / CHECKSUMS).unlink()
    if resume:
        run.recover()
        run.drop_stages("problems.jsonl", {"read", "negatives"})
        run.drop_stages("notes.jsonl", {"read"})
    if changed:
        keep_old(run, changed)
    write_text(path, text)
    run.write_environment()


def recipe_changes(path: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: stored -> now. Keys that the stored recipe lacks have their defaults.

    Raises:
        RecipeError: the stored recipe is not YAML.
    """
    try:
        tree = read_tree(path)
    except RecipeError as error:
        raise RecipeError(f"{error}: restore the run's recipe from a copy, or start a new run") from None
    # One that names code, and one of another version that this one cannot parse, are compared as they stand: the file
    # may be somebody else's, and parsing imports what it names.
    if not code_names(tree):
        with contextlib.suppress(RecipeError, TypeError, AttributeError):
            tree = parse_recipe(tree, where=str(path)).model_dump(mode="json")
    old, new = _flat(tree), _flat(recipe.model_dump(mode="json"))
    return {
        key: (old.get(key, ABSENT), new.get(key, ABSENT))
        for key in dict.fromkeys((*old, *new))
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def keep_old(run: RunDir, changed: Mapping[str, Any]) -> None:
    """Move what the old recipe made, and the new one makes anew, to numbered names: ``recipe.1.yaml``, ...

    Checkpoints stay: training goes on from the last one.
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
