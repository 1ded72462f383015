"""No picture is on two sides, the shares are exact, and the split hangs on content and seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdpo.data.split import SplitKeys, _named, _text_key, split_by_image
from cwdpo.errors import DataError
from cwdpo.files.stored import Stored
from cwdpo.records import Completion, Example, ImageRef, Message


def example(name: str, *images: bytes, text: str = "Q") -> Example:
    refs = tuple(ImageRef(data=image) for image in images)
    return Example(name, refs, (Message("user", (*[None] * len(refs), text)),), Completion("A"))


def ids(parts: Mapping[str, Sequence[Example]]) -> dict[str, list[str]]:
    return {name: [e.id for e in part] for name, part in parts.items()}


SHARES = st.lists(st.integers(0, 10), min_size=1, max_size=4).filter(any)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), max_size=60), SHARES, st.integers(0, 5))
def test_every_example_once_no_picture_twice_shares_exact(
    pictures: list[int], shares: list[int], seed: int
) -> None:
    examples = [example(str(i), bytes([picture])) for i, picture in enumerate(pictures)]
    fractions = {f"part{i}": share / sum(shares) for i, share in enumerate(shares)}
    parts = split_by_image(examples, fractions, seed)
    assert list(parts) == list(fractions)
    assert sorted((e.id for part in parts.values() for e in part), key=int) == [e.id for e in examples]
    seen: set[bytes] = set()
    for name, part in parts.items():
        here = {e.images[0].encoded() for e in part}
        assert not here & seen
        seen |= here
        assert abs(len(here) - fractions[name] * len(set(pictures))) <= 1
        assert [int(e.id) for e in part] == sorted(int(e.id) for e in part)


def test_order_and_names_of_files_do_not_matter(tmp_path: Path) -> None:
    fractions = {"stage1": 0.75, "stage2": 0.25}
    by_bytes = [example(str(i), bytes([i])) for i in range(40)]
    by_path = []
    for i in range(40):
        (tmp_path / f"{i * 7}.png").write_bytes(bytes([i]))
        image = ImageRef(path=tmp_path / f"{i * 7}.png")
        by_path.append(Example(str(i), (image,), by_bytes[i].prompt, Completion("other")))
    want = ids(split_by_image(by_bytes, fractions, 1))
    assert (len(want["stage1"]), len(want["stage2"])) == (30, 10)
    assert ids(split_by_image(by_path, fractions, 1)) == want
    backward = ids(split_by_image(by_bytes[::-1], fractions, 1))
    assert {name: sorted(part) for name, part in backward.items()} == {n: sorted(p) for n, p in want.items()}


def test_the_seed_counts_and_the_split_never_changes() -> None:
    examples = [example(str(i), bytes([i])) for i in range(12)]
    halves = {"a": 0.5, "b": 0.5}
    assert ids(split_by_image(examples, halves, 1)) != ids(split_by_image(examples, halves, 2))
    # Written down: a split that changes between versions leaks test pictures into training.
    assert ids(split_by_image(examples, halves, 0))["a"] == ["1", "2", "5", "8", "9", "10"]


def test_pictures_seen_together_stay_together() -> None:
    chain = [example(str(i), bytes([i]), bytes([i + 1])) for i in range(10)]
    others = [example(f"x{i}", bytes([100 + i])) for i in range(10)]
    for seed in range(5):
        parts = split_by_image([*chain, *others], {"a": 0.5, "b": 0.5}, seed)
        assert sorted(sum(e.id.isdigit() for e in part) for part in parts.values()) == [0, 10]


def test_without_pictures_the_prompt_decides() -> None:
    examples = [example(f"{question}-{i}", text=f"Q{question}") for question in range(10) for i in range(3)]
    parts = ids(split_by_image(examples, {"a": 0.3, "b": 0.7}, 0))
    questions = {name: {i.split("-")[0] for i in part} for name, part in parts.items()}
    assert (len(questions["a"]), len(questions["b"]), len(parts["a"])) == (3, 7, 9)


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": -0.5, "b": 1.5}, {"a": float("nan")}]
)
def test_fractions_that_are_no_shares(fractions: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"split fractions .* allowed"):
        split_by_image([example("x", b"x")], fractions, 0)


def test_a_picture_that_has_gone(tmp_path: Path) -> None:
    gone = Example("x", (ImageRef(path=tmp_path / "gone.png"),), (Message("user", (None,)),), Completion("A"))
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        split_by_image([gone], {"a": 1.0}, 0)


def slow_split(examples: list[Example], shares: list[float], seed: int) -> list[list[str]]:
    """Groups by hand: sets of pictures that are joined as long as two of them share one."""
    groups: list[set[bytes]] = []
    for e in examples:
        own = {b"image:" + blake2b(i.encoded(), digest_size=16).digest() for i in e.images}
        own = own or {_named(_text_key(e))}
        own = own.union(*(g for g in groups if g & own))
        groups = [g for g in groups if not g & own] + [own]
    order = sorted(groups, key=lambda g: blake2b(f"{seed}:".encode() + min(g), digest_size=16).digest())
    ends = [round(sum(shares[: i + 1]) * len(order)) for i in range(len(shares))]
    found: list[list[str]] = [[] for _ in shares]
    for e in examples:
        key = b"image:" + blake2b(e.images[0].encoded(), digest_size=16).digest() if e.images else None
        place = next(i for i, g in enumerate(order) if (key or _named(_text_key(e))) in g)
        found[next(i for i, end in enumerate(ends) if place < end)].append(e.id)
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 25), max_size=3), min_size=1, max_size=40), st.integers(0, 3))
def test_groups_are_those_of_a_plain_search(pictures: list[list[int]], seed: int) -> None:
    examples = [
        example(str(i), *(bytes([p]) for p in own), text=f"Q{i % 4}") for i, own in enumerate(pictures)
    ]
    wanted = slow_split(examples, [0.25, 0.25, 0.5], seed)
    fractions = {"a": 0.25, "b": 0.25, "c": 0.5}
    assert list(ids(split_by_image(examples, fractions, seed)).values()) == wanted
    assert list(ids(split_by_image(Stored(examples), fractions, seed)).values()) == wanted


def test_a_part_is_split_by_the_keys_that_were_read_before(tmp_path: Path) -> None:
    examples = [example(str(i), bytes([i % 7]), *([bytes([9])] if i % 5 == 0 else [])) for i in range(40)]
    keys, halves = SplitKeys.of(examples), {"a": 0.5, "b": 0.5}
    first = keys.parts(halves, 1)["a"]
    again = keys.select(first).parts(halves, 2)
    wanted = split_by_image([examples[i] for i in first], halves, 2)
    assert {name: [examples[first[i]].id for i in places] for name, places in again.items()} == ids(wanted)
    assert SplitKeys.of([]).parts(halves, 0)["a"].tolist() == []
