"""Records on disk that are used like a list: memory has eight bytes for each, whatever it holds."""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from cwdpo.errors import DataError

T = TypeVar("T")
IN_MEMORY = 64 << 20
"""Bytes of records that are kept in memory; with more, all but the newest are in a temporary file."""
_PART = 1 << 20
_USUAL = 1 << 12  # bytes read at once: most records are smaller
_HEAD = 4  # bytes of a record's length


class Stored(Sequence[T], Generic[T]):
    """A sequence of records in a temporary file without a name, which ends with its last view.

    A record is read, as a new object, whenever it is used. Slices and :meth:`select` are views: they copy no record.

    Args:
        records: the first records.

    Raises:
        DataError: the folder of temporary files (``TMPDIR``) has no room.
    """

    def __init__(self, records: Iterable[T] = ()) -> None:
        self._file = _File()
        self._places = array("Q")
        for record in records:
            self.append(record)

    def append(self, record: T) -> None:
        """Add a record at the end."""
        self._places.append(self._file.add(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)))

    def add_from(self, other: Stored[T], index: int) -> None:
        """Add a record of another view of the same file."""
        self._places.append(other._places[index])

    def select(self, index: Iterable[int]) -> Stored[T]:
        """The records at these places, in this order, as a view."""
        places = self._places
        return self._view(array("Q", (places[i] for i in index)))

    def _view(self, places: array[int]) -> Stored[T]:
        view: Stored[T] = Stored()
        view._file, view._places = self._file, places
        return view

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Stored[T]: ...
    def __getitem__(self, index: int | slice) -> T | Stored[T]:
        if isinstance(index, slice):
            return self._view(self._places[index])
        record: T = pickle.loads(self._file.read(self._places[index]))
        return record

    def __iter__(self) -> Iterator[T]:
        return (pickle.loads(self._file.read(place)) for place in self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Stored({len(self)} records)"


class Chosen(Generic[T]):
    """Some records of a sequence, as they are or changed; those that are not changed are not written again.

    Args:
        source: the sequence.

    Attributes:
        records: the records so far.
    """

    def __init__(self, source: Sequence[T]) -> None:
        self._source = source
        self.records: Stored[T] = source.select(()) if isinstance(source, Stored) else Stored()

    def keep(self, index: int) -> None:
        """Add a record of the source."""
        if isinstance(self._source, Stored):
            self.records.add_from(self._source, index)
        else:
            self.records.append(self._source[index])

    def append(self, record: T) -> None:
        """Add another record."""
        self.records.append(record)


def select(records: Sequence[T], index: Iterable[int]) -> Sequence[T]:
    """The records at these places, in this order: a view, if they are on disk."""
    return records.select(index) if isinstance(records, Stored) else [records[i] for i in index]


class _File:
    """Byte strings one after the other, each after its length; the last ones are not written yet."""

    def __init__(self) -> None:
        self._file: Any = None
        self._written, self._rest, self._most = 0, bytearray(), IN_MEMORY

    def add(self, data: bytes) -> int:
        """Add a byte string; returns its place."""
        place = self._written + len(self._rest)
        self._rest += len(data).to_bytes(_HEAD, "little") + data
        if len(self._rest) > self._most:
            self._write()
        return place

    def read(self, place: int) -> bytes:
        """The byte string at a place."""
        start = place - self._written
        if start >= 0:
            size = int.from_bytes(self._rest[start : start + _HEAD], "little")
            return bytes(self._rest[start + _HEAD : start + _HEAD + size])
        data = self._read(place, _USUAL)
        size = int.from_bytes(data[:_HEAD], "little")
        while len(data) < _HEAD + size:
            more = self._read(place + len(data), _HEAD + size - len(data))
            if not more:
                raise EOFError(f"the file of stored records ends at {place + len(data)}")
            data += more
        return data[_HEAD : _HEAD + size]

    def _read(self, place: int, size: int) -> bytes:
        """Some bytes, without moving the file's position: forked processes and threads share it."""
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, place)
        self._file.seek(place)  # Windows, which has no fork
        data: bytes = self._file.read(size)
        return data

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file, self._most = tempfile.TemporaryFile(buffering=0), _PART  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(0, 2)
            rest = memoryview(self._rest)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: the rows cannot be kept there ({error.strerror}): set TMPDIR to a folder "
                "with more room"
            ) from None
        self._written += len(self._rest)
        self._rest = bytearray()
