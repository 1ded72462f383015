"""Records on disk are used like a list."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwdpo.errors import DataError
from cwdpo.files import stored
from cwdpo.files.stored import Chosen, Stored, select
from cwdpo.records import Completion, Example, ImageEdit, ImageRef, Message


def example(i: int) -> Example:
    size = (0, 10, 5000, 70_000)[i % 4]
    return Example(
        f"row {i}", (ImageRef(data=bytes(size)),), (Message("user", (None, "Q" * i)),), Completion("a")
    )


@pytest.mark.parametrize("in_memory", [0, 8000, 1 << 30])
def test_it_is_the_list(monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", in_memory)
    monkeypatch.setattr(stored, "_PART", 6000)
    records = [example(i) for i in range(40)]
    kept: Stored[Example] = Stored()
    for i, record in enumerate(records):
        kept.append(record)
        assert kept[i // 2] == records[i // 2]  # between two additions
    assert list(kept) == records
    assert kept == records
    assert kept != records[:-1]
    assert kept[-1] == records[-1]
    assert kept[3:17:2] == records[3:17:2]
    index = random.Random(0).sample(range(40), 15)
    view = select(kept, index)
    assert isinstance(view, Stored)
    assert view == select(records, index) == [records[i] for i in index]
    del kept
    assert list(view[:3]) == [records[i] for i in index[:3]]
    with pytest.raises(IndexError):
        view[15]


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Callable[[], None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "IN_MEMORY", 100)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"cannot be kept there \(No space left on device\): set TMPDIR"):
        Stored([example(3)])


def test_forked_processes_read_at_the_same_time(monkeypatch) -> None:
    """They share the position in the file."""
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    monkeypatch.setattr(stored, "_PART", 0)
    records = Stored([("x" * (i % 50), i) for i in range(3000)])

    def wrong(k: int) -> None:
        os._exit(any(records[i] != ("x" * (i % 50), i) for i in [*range(k, 3000, 4)] * 20))

    children = []
    for k in range(4):
        pid = os.fork()
        if pid == 0:
            wrong(k)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4


def test_records_that_are_kept_are_not_written_again() -> None:
    source: Stored[Example] = Stored(example(i) for i in range(6))
    chosen = Chosen(source.select([5, 3, 1]))
    chosen.keep(1)
    chosen.append(example(9))
    chosen.keep(0)
    assert list(chosen.records) == [example(3), example(9), example(5)]
    assert chosen.records._file is source._file
    assert list(source) == [example(i) for i in range(6)]
    plain = Chosen([example(2), example(4)])
    plain.keep(1)
    assert list(plain.records) == [example(4)]


def test_the_same_path_is_read_back_as_the_same_object() -> None:
    """Making a path costs more than reading a record."""
    image = ImageRef(path=Path("a/b.png"), edit=ImageEdit(noise=0.5))
    kept: Stored[ImageRef] = Stored([image, ImageRef(path=Path("a/b.png")), ImageRef(data=b"x")])
    assert list(kept) == [image, ImageRef(path=Path("a/b.png")), ImageRef(data=b"x")]
    assert kept[0].path is kept[1].path
