"""Encoded examples of a file are those of the list, with images, reference values and filters."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cwdpo.data.encode import encoded_rows
from cwdpo.data.encode.encoded_rows import EncodedRows, reference_means
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.encode.encoding import encode_rows
from cwdpo.files.stored import Stored
from cwdpo.records import Completion, Example, ImageEdit
from cwdpo.scoring.pairs import with_reference


@pytest.fixture
def rows(encoder: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> Any:
    """(rows on disk, the same as a list): with images, without, and with negatives that have images of their own."""
    monkeypatch.setattr(encoded_rows, "_BATCH", 4)
    monkeypatch.setattr(encoded_rows, "_KEPT", 8)
    monkeypatch.setattr(encoded_rows, "_SINGLY", 3)
    mixed: list[Example] = []
    for i, e in enumerate(examples[:18]):
        if i % 3 == 0:
            e = replace(e, images=(), prompt=tuple(replace(m, parts=("Which?",)) for m in e.prompt))
        if i % 3 == 1:
            edited = tuple(replace(image, edit=ImageEdit((0, 0, 0.5, 0.5))) for image in e.images)
            side = Completion(
                e.chosen.text, kind="image_crop", made={"reward_margin": 0.1 + i}, images=edited
            )
            e = replace(e, rejected=(*e.rejected, side, replace(side, text="no")), source="a")
        if i == 7:
            e = replace(e, chosen=Completion(""))  # cannot be encoded
        if i == 8:
            e = replace(e, rejected=())
        mixed.append(e)
    stored, problems = encode_rows(encoder, Stored(mixed), "rejected", require_negative=True)
    wanted, same = encoder.encode_all(mixed, "rejected", require_negative=True)
    assert problems == same
    assert len(problems) == 2
    assert len(stored) == len(wanted) == 16
    return stored, wanted


def test_they_are_the_list(rows: tuple[EncodedRows, list[EncodedExample]]) -> None:
    stored, wanted = rows
    assert list(stored) == wanted
    assert [stored[i] for i in range(16)] == wanted
    index = random.Random(0).sample(range(16), 11)
    view = stored.select(index)
    assert list(view) == [wanted[i] for i in index]
    assert list(view[2:9:3]) == [wanted[i] for i in index][2:9:3]
    assert view[-1] == wanted[index[-1]]
    assert [stored.examples[i].id for i in view.numbers] == [wanted[i].id for i in index]
    with pytest.raises(IndexError):
        stored[16]


def test_images_are_those_of_their_prompt(rows: tuple[EncodedRows, list[EncodedExample]]) -> None:
    for one, other in zip(*rows, strict=True):
        assert len(one.prompts) == len(other.prompts) == (2 if other.source else 1)
        for mine, theirs in zip(one.prompts, other.prompts, strict=True):
            assert mine.images.keys() == theirs.images.keys()
            assert all(torch.equal(mine.images[k], theirs.images[k]) for k in theirs.images)
    sides = [row.prompts[1].images["pixel_values"] for row in rows[0] if row.source]
    assert not any(
        torch.equal(side, row.prompt.images["pixel_values"])
        for side, row in zip(sides, (r for r in rows[0] if r.source), strict=True)
    )


def test_reference_values_and_filters(rows: tuple[EncodedRows, list[EncodedExample]]) -> None:
    stored, wanted = rows
    values = np.random.default_rng(0).normal(-9, 5, (sum(len(e.completions) for e in wanted), 2))
    rest = iter(values.tolist())
    scored = [with_reference(e, [next(rest) for _ in e.completions]) for e in wanted]
    assert list(stored.with_reference(values)) == scored

    def keeps(mean_logp: float) -> bool:
        return mean_logp > -1.0

    def kept(e: EncodedExample) -> EncodedExample:
        return replace(e, negatives=tuple(c for c in e.negatives if keeps(c.reference_mean_logp or 0.0)))

    every = [kept(e) for e in scored]
    paired = [e for e in every if e.negatives]
    assert 0 < len(paired) < 16
    assert list(stored.with_reference(values).filtered(keeps, need=False)) == every
    assert list(stored.with_reference(values).filtered(keeps, need=True)) == paired
    assert list(stored.filtered(keeps, need=True)) == wanted  # nothing is known yet
    assert [means.tolist() for means in reference_means(stored)] == [[], []]
    for view in (
        stored.with_reference(values),
        stored.with_reference(values).filtered(keeps, need=True)[::-2],
    ):
        found, plain = reference_means(view), reference_means(list(view))
        assert [means.tolist() for means in found] == [means.tolist() for means in plain]
        assert len(plain[0]) == len(view)


def test_values_of_some_rows_are_placed_in_the_file(rows: tuple[EncodedRows, list[EncodedExample]]) -> None:
    stored, wanted = rows
    view = stored[3::5]
    n = sum(len(e.completions) for e in view)
    values = np.arange(2.0 * n).reshape(n, 2)
    placed = view.of_all_completions(values)
    assert placed.shape == (sum(len(e.completions) for e in wanted), 2)
    assert np.isnan(placed).any(axis=1).sum() == len(placed) - n
    rest = iter(values.tolist())
    assert list(view.with_reference(placed)) == [
        with_reference(e, [next(rest) for _ in e.completions]) for e in wanted[3::5]
    ]


@pytest.mark.parametrize("sides", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_sizes_are_those_of_the_rows(
    rows: tuple[EncodedRows, list[EncodedExample]], encoder: Any, *, shared: bool, sides: bool
) -> None:
    stored, wanted = rows
    if not sides:
        plain = [e for e, w in zip(stored.select(range(16)), wanted, strict=True) if not w.source]
        own = Stored(
            [stored.examples[n] for n, w in zip(stored.numbers, wanted, strict=True) if not w.source]
        )
        stored, wanted = encode_rows(encoder, own, "rejected", require_negative=True)[0], plain
    values = np.random.default_rng(0).normal(-9, 5, (len(stored.lengths), 2))
    filtered = stored.with_reference(values).filtered(lambda mean_logp: mean_logp > -1.0, need=False)
    for view in (stored, stored[::3], filtered):
        for negatives in (True, False):
            expected = [
                (e if negatives else replace(e, negatives=())).row_tokens(shared=shared) for e in view
            ]
            found = zip(*view.row_sizes(shared=shared, negatives=negatives), strict=True)
            assert [tuple(map(int, one)) for one in found] == [(len(s), max(s), sum(s)) for s in expected]
