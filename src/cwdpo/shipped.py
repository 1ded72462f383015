"""The recipes of the package. Does not import torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from cwdpo.errors import RecipeError

FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Names of the recipes, for ``cwdpo train NAME``."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(path: str | Path) -> Path:
    """A recipe's file: the path, or, if there is no such file and it is the name of a shipped recipe, its file."""
    path = Path(path)
    if path.is_file() or str(path) not in names():
        return path
    return FOLDER / f"{path}.yaml"


def is_name(path: str | Path) -> bool:
    """Whether a command's argument is the name of a shipped recipe, and not a file or folder here."""
    return not Path(path).exists() and str(path) in names()


def suggested(name: str) -> str:
    """For the message about a name that is not there: the shipped recipes with similar names, or how to list all."""
    asked, known = re.sub(r"\W+", "_", name.lower()), names()
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.6)
    near += [one for one in known if one not in near and len(asked) > 2 and one.startswith(asked)]
    shown = " or ".join(map(repr, near))
    return f"; did you mean {shown}?" if near else "; `cwdpo recipe list` names the recipes of the package"


def nearest_name(path: Path) -> str:
    """See :func:`suggested`; an empty text for a path of several parts or a file's name, which is no recipe's name."""
    named = len(path.parts) == 1 and path.suffix.lower() not in (".yaml", ".yml")
    return suggested(str(path)) if named else ""


def text(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        RecipeError: there is no such recipe; the message names those with similar names.
    """
    if name not in names():
        raise RecipeError(f"no shipped recipe {name!r}{suggested(name)}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The comment at the start of a recipe, up to the first full stop, colon or semicolon."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return re.split(r"[.:;]( |$)", " ".join(lines), maxsplit=1)[0]
