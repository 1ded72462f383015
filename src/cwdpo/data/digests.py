"""Sets of digests for large data: two machine words per entry, while Python's sets need ten or more."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Any

_ROW_BITS = 40  # bits for the row in a stored place; the other bits are the file's number


def digest8(data: bytes) -> int:
    """The 8-byte blake2b digest as an integer, never 0.

    Among a million different inputs, two have the same digest with probability 3e-8.
    """
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1


def as_text(value: Any) -> str:
    """A text that identifies a value that JSON does not support: bytes, or a decoded image."""
    data = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    return repr(value) if data is None else blake2b(data, digest_size=16).hexdigest()


class DigestMap:
    """Maps digests to integers from 0 to 2**64 - 1, by open addressing in two arrays.

    At most two thirds of the slots are used, so an entry takes 24 to 48 bytes.
    """

    def __init__(self) -> None:
        self._size = 0
        self._keys, self._values = _zeros(1024), _zeros(1024)

    def __len__(self) -> int:
        return self._size

    def get(self, digest: int) -> int | None:
        """The value of a digest, or ``None``."""
        slot = self._slot(digest)
        return self._values[slot] if self._keys[slot] else None

    def add(self, digest: int, value: int = 0) -> int | None:
        """Store a value unless the digest has one; returns the value that it had before, or ``None``."""
        slot = self._slot(digest)
        if self._keys[slot]:
            return self._values[slot]
        self._keys[slot], self._values[slot] = digest, value
        self._size += 1
        if 3 * self._size > 2 * len(self._keys):
            self._grow()
        return None

    def put(self, digest: int, value: int) -> int | None:
        """Store a value and replace any other; returns the value that it had before, or ``None``."""
        before = self.add(digest, value)
        if before is not None:
            self._values[self._slot(digest)] = value
        return before

    def _slot(self, digest: int) -> int:
        """The slot of the digest, or the free slot for it."""
        keys, last = self._keys, len(self._keys) - 1
        slot = digest & last
        while keys[slot] and keys[slot] != digest:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._keys, self._values = _zeros(2 * len(keys)), _zeros(2 * len(keys))
        for key, value in zip(keys, values, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._values[slot] = key, value


def _zeros(n: int) -> array[int]:
    return array("Q", bytes(8 * n))


class FirstPlaces:
    """The file and row where each digest occurred first."""

    def __init__(self) -> None:
        self._places = DigestMap()
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, digest: int) -> str | None:
        """``file:row`` of a digest, or ``None``."""
        place = self._places.get(digest)
        return None if place is None else self._name(place)

    def add(self, digest: int, file: str, row: int) -> str | None:
        """Add a digest; returns ``file:row`` of its first occurrence, or ``None`` if it is new."""
        number = self._files.setdefault(file, len(self._files))
        before = self._places.add(digest, number << _ROW_BITS | row)
        return None if before is None else self._name(before)

    def _name(self, place: int) -> str:
        file = list(self._files)[place >> _ROW_BITS]
        return f"{file}:{place & ((1 << _ROW_BITS) - 1)}"
