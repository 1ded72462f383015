"""Files that may be packed by gzip: what they hold, and their bytes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import BinaryIO, cast

GZIP = ".gz"


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case and without ``.gz``.

    >>> kind_of(Path("train.JSONL.gz"))
    '.jsonl'
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == GZIP else suffix


def bare_name(path: Path) -> str:
    """The name without the suffixes that say what the file holds: ``train`` of ``train.jsonl.gz``."""
    name = path.stem if path.suffix.lower() == GZIP else path.name
    return Path(name).stem


def open_bytes(path: Path) -> BinaryIO:
    """The file, unpacked if it is a ``.gz`` or a ``.tgz``."""
    packed = path.suffix.lower() in (GZIP, ".tgz")
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")
