"""Paths of images and videos in a row: they must stay in one folder, links followed; no address is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from cwdpo.data.problems import RowError, shown

Medium = Literal["image", "video"]


def path_inside(root: Path | None, text: str, key: str, medium: Medium, forms: str) -> Path:
    """The real path, after following dots and links; it must be inside the root.

    Args:
        root: the resolved folder; ``None`` if there is none.
        text: a value of a row.
        key: its place in the row.
        medium: what it is, for messages and kinds of problems (``image-escapes``).
        forms: the allowed forms of such a value.

    Raises:
        RowError: it is an address, cannot be a path, or leads outside.
    """
    text = text.removeprefix("file://")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise RowError(
            f"{medium}-url",
            key,
            f"{shown(text, 60)} is a URL; allowed: {forms}",
            f"download the {medium}s once and name the local files",
        )
    if root is None:
        raise RowError(
            f"{medium}-missing",
            key,
            f"{shown(text)} is a path, and rows from the hub have no folder",
            f"set data.image_root (validate: --image-root) to the folder of the {medium}s",
        )
    try:
        path = (root / text).resolve()
    except (OSError, ValueError, RuntimeError):
        raise RowError(
            f"{medium}-missing", key, f"{shown(text)} cannot be a path", "correct the path"
        ) from None
    if not path.is_relative_to(root):
        raise RowError(
            f"{medium}-escapes",
            key,
            f"{shown(text, 200)} leads outside {root}; allowed: paths that stay inside it, links followed",
            f"move the {medium}s below that folder, or set data.image_root (validate: --image-root) to the "
            "folder that holds them",
        )
    return path


def missing(root: Path | None, text: str, key: str, medium: Medium) -> RowError:
    """The error for a path where nothing is."""
    what = "file" if medium == "image" else "file or folder of frames"
    return RowError(
        f"{medium}-missing",
        key,
        f"there is no {what} {shown(text, 200)} in {root}",
        f"correct the path, or set data.image_root (validate: --image-root) to the folder that {medium} "
        "paths start from",
    )
