"""Files that may be compressed with gzip: their kind and their bytes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import BinaryIO, cast

GZIP = ".gz"


def kind_of(path: Path) -> str:
    """The suffix of a file's content, in lower case and without ``.gz``.

    >>> kind_of(Path("train.JSONL.gz"))
    '.jsonl'
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == GZIP else suffix


def bare_name(path: Path) -> str:
    """The name without suffixes: ``train`` for ``train.jsonl.gz``."""
    name = path.stem if path.suffix.lower() == GZIP else path.name
    return Path(name).stem


def open_bytes(path: Path) -> BinaryIO:
    """Open a file; a ``.gz`` or ``.tgz`` is decompressed."""
    packed = path.suffix.lower() in (GZIP, ".tgz")
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")
