"""Seeded damage to bytes: what a disk, a bad line, a hand or an attacker makes of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD_TEXTS = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xae", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"''",
    b"{}", b"[]", b"true", b'"\\ud800"', b"<image>", b"../../../etc/passwd", b"file:///etc/passwd", b"http://127.0.0.1:9/",
    b"a.py:X", b"!!python/name:os.system", b"&a [*a]", b"\n", b": ", b"%s%s%n", b"{{ 7*7 }}", b"</s>", b"\r\n", b"#",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**400, "", "\ud800", "x" * 3000, [], {}, [[]], {"a": {"b": []}}, "<image>", "../x",
    [None], float("inf"), "a.py:X", -(10**20),
)  # fmt: skip


def mutate(data: bytes, rng: Random) -> bytes:
    """The bytes with one to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(OPERATIONS)(data, rng)
    return data


def _place(data: bytes, rng: Random) -> int:
    return rng.randrange(len(data) + 1)


def cut(data: bytes, rng: Random) -> bytes:
    """The beginning only."""
    return data[: _place(data, rng)]


def flip(data: bytes, rng: Random) -> bytes:
    """One bit turned."""
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def lose(data: bytes, rng: Random) -> bytes:
    """A stretch missing."""
    at = _place(data, rng)
    return data[:at] + data[at + rng.randrange(1, 200) :]


def repeat(data: bytes, rng: Random) -> bytes:
    """A stretch twice or often."""
    at = _place(data, rng)
    part = data[at : at + rng.randrange(1, 60)]
    return data[:at] + part * rng.choice((2, 3, 50)) + data[at:]


def insert(data: bytes, rng: Random) -> bytes:
    """Odd bytes somewhere."""
    at = _place(data, rng)
    return data[:at] + rng.choice(ODD_TEXTS) + data[at:]


def noise(data: bytes, rng: Random) -> bytes:
    """A stretch of random bytes."""
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]


def nest(data: bytes, rng: Random) -> bytes:
    """Brackets without end."""
    at, depth = _place(data, rng), rng.choice((50, 500, 50_000))
    return data[:at] + rng.choice((b"[", b"{", b'{"a":')) * depth + data[at:]


def retype(data: bytes, rng: Random) -> bytes:
    """A value of a JSON document, or of a line of one, replaced by one of another type."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    for part, rebuilt in (
        (data, lambda new: new),
        (lines[number], lambda new: b"\n".join([*lines[:number], new, *lines[number + 1 :]])),
    ):
        try:
            tree = json.loads(part)
        except (ValueError, RecursionError):
            continue
        return rebuilt(json.dumps(_retyped(tree, rng)).encode())
    return insert(data, rng)


def _retyped(tree: Any, rng: Random) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        how = rng.random()
        if how < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if how < 0.2:
            return {**tree, rng.choice(("x", "\ud800", "text", "id", "")): tree[key]}
        return {**tree, key: _retyped(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        return [*tree[:at], _retyped(tree[at], rng), *tree[at + 1 :]]
    return rng.choice(ODD_VALUES)


OPERATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    cut, flip, flip, lose, repeat, insert, insert, noise, nest, retype, retype, retype,
)  # fmt: skip
WHOLE_FILE: dict[str, Callable[[bytes, Random], bytes | None]] = {
    "missing": lambda data, rng: None,
    "empty": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.randrange(len(data))] if data else b"",
    "flipped": flip,
    "garbage": lambda data, rng: rng.randbytes(max(len(data), 10)),
    "longer": lambda data, rng: data + rng.randbytes(20),
    "mutated": mutate,
    "retyped": retype,
}
"""Ways to damage a file of a run folder; ``None`` is no file."""
