"""The recipes of the package. Does not import torch."""

from __future__ import annotations

import re
from pathlib import Path

from cwdpo.errors import RecipeError, nearest

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Names of the recipes, for ``cwdpo train NAME``."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(path: str | Path) -> Path:
    """A recipe's file: the path, or, if it does not exist and is the name of a shipped recipe, that recipe's file."""
    path = Path(path)
    if path.exists() or str(path) not in names():
        return path
    return FOLDER / f"{path}.yaml"


def nearest_name(path: Path) -> str:
    """A suggestion for the message about a missing file: the shipped recipe with a similar name, or an empty text."""
    return nearest(str(path), names()) if len(path.parts) == 1 else ""


def text(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        RecipeError: there is no such recipe; the message names the most similar one.
    """
    if name not in names():
        raise RecipeError(f"no shipped recipe {name!r}{nearest(name, names())}; known: {', '.join(names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The comment at the start of a recipe, up to the first full stop or colon."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return re.split(r"[.:]( |$)", " ".join(lines), maxsplit=1)[0]
