"""The recipes that come with the package. No torch is imported here."""

from __future__ import annotations

import re
from pathlib import Path

from cwdpo.errors import RecipeError, nearest

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Their names, as ``cwdpo train NAME`` takes them."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(path: str | Path) -> Path:
    """A recipe's file: the path itself, or a shipped recipe where there is no such file and the path is its name."""
    path = Path(path)
    if path.exists() or str(path) not in names():
        return path
    return FOLDER / f"{path}.yaml"


def nearest_name(path: Path) -> str:
    """For the message about a file that does not exist: the shipped recipe that it may be meant to be, or nothing."""
    return nearest(str(path), names()) if len(path.parts) == 1 else ""


def text(name: str) -> str:
    """What a shipped recipe holds.

    Raises:
        RecipeError: there is no such recipe; the nearest is named.
    """
    if name not in names():
        raise RecipeError(f"no shipped recipe {name!r}{nearest(name, names())}; known: {', '.join(names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The comment at a recipe's head, up to the first full stop or colon."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return re.split(r"[.:]( |$)", " ".join(lines), maxsplit=1)[0]
