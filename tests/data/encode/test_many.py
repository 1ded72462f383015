"""Rows that are encoded together are the rows that are encoded alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from cwdpo.data.encode import encoder as encoding
from cwdpo.data.encode import many
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.many import ManyPrompts
from cwdpo.data.encode.render import Renderer
from cwdpo.data.images import _lossless
from cwdpo.errors import DataError
from cwdpo.records import Completion, Example, ImageRef, Message


def mixed(examples: list[Example]) -> list[Example]:
    """Rows without, with one and with two images of several sizes, and rows that are refused for several reasons."""
    sizes = [(40, 30), (64, 64), (30, 70), (64, 20)]
    pictures = [ImageRef(data=_lossless(Image.new("RGB", size, "red"))) for size in sizes]
    rows = []
    for i, e in enumerate([*examples[:30], *examples[:20]]):
        n = (0, 1, 1, 2)[i % 4]
        images = tuple(pictures[(i + k) % 4] for k in range(n))
        e = replace(
            e, id=f"{i}", images=images, prompt=(Message("user", (*[None] * n, f"What is it? {i % 7} ")),)
        )
        if i == 5:
            e = replace(e, chosen=Completion(""))
        if i == 9:
            e = replace(e, prompt=(Message("user", (None, "Is it <image>?")),))
        if i == 14:
            e = replace(e, images=(ImageRef(data=b"no image"),))
        if i == 18:
            e = replace(e, rejected=(Completion(" a dog \n"), Completion("a dog"), *e.rejected))
        rows.append(e)
    return rows


def alone(encoder: Encoder, rows: list[Example]) -> tuple[list[Any], list[str]]:
    good, problems = [], []
    for row in rows:
        try:
            good.append(encoder.encode(row))
        except DataError as error:
            problems.append(str(error))
    return good, without_addresses(problems)


def all_at_once(encoder: Encoder, rows: list[Example]) -> tuple[list[Any], list[str]]:
    good, problems = encoder.encode_all(rows, "rejected", require_negative=False)
    return good, without_addresses(problems)


def without_addresses(problems: list[str]) -> list[str]:
    """Pillow's message has the place of the bytes in memory."""
    return [re.sub("0x[0-9a-f]+", "", problem) for problem in problems]


@pytest.mark.parametrize("together", [3, 128])
def test_together_as_alone(
    processor: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(encoding, "TOGETHER", together)
    monkeypatch.setattr(many, "CHECKED", 2)
    rows = mixed(examples)
    wanted, problems = alone(Encoder(processor), rows)
    assert len(problems) == 3
    given: list[int] = []
    call = ManyPrompts.__call__

    def counted(self: ManyPrompts, asked: Any) -> Any:
        found = call(self, asked)
        given.extend(len(e.images) for e, _ in found)
        return found

    monkeypatch.setattr(ManyPrompts, "__call__", counted)
    encoder = Encoder(processor)
    assert all_at_once(encoder, rows) == (wanted, problems)
    assert set(given) == ({0, 1, 2} if together == 3 else {0})  # sizes of images are learned by then
    encoder.forget()
    assert all_at_once(encoder, rows) == (wanted, problems)
    assert set(given) == {0, 1, 2}


def test_another_result_of_a_joint_call_is_not_used(
    processor: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed(examples)
    wanted = alone(Encoder(processor), rows)
    expanded = many._expanded
    monkeypatch.setattr(many, "_expanded", lambda values, times: (*expanded(values, times), 1))
    encoder = Encoder(processor)
    for _ in range(2):
        assert all_at_once(encoder, rows) == wanted
        encoder.forget()


def test_what_cannot_be_rendered_together_is_rendered_alone(
    processor: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed(examples)[:8]
    wanted = alone(Encoder(processor), rows)
    calls: list[int] = []
    monkeypatch.setattr(
        Renderer, "many", lambda self, orders: calls.append(len(orders)) or [None] * len(orders)
    )
    assert all_at_once(Encoder(processor), rows) == wanted
    assert calls
