"""Writes JSONL rows with their images next to them, so that the data set can be read from anywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cwdpo.files.writing import clear_unfinished, replacing, write_text


def store_rows(root: Path, out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``out/train.jsonl``, and link or copy the images that its rows name from ``root`` to ``out``."""
    names = {n for row in rows for n in _pictures(row)}
    for name in sorted(names):
        source, target = root / name, out / name
        if Path(name).is_absolute() or not source.is_file() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # the folders are on different file systems
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    path = out / "train.jsonl"
    clear_unfinished(path)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def said(text: str) -> list[dict[str, Any]]:
    """A response as TRL's rows have it: one assistant turn."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def _pictures(row: Mapping[str, Any]) -> list[str]:
    value = row.get("images", row.get("image"))
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
