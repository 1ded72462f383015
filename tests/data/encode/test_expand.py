"""Prompts are encoded from the sizes of their images; pixels are read when they are needed, and compared then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.expand import CHECKED, Expansions, Written
from cwdpo.errors import DataError
from cwdpo.records import ImageRef


class Opened:
    """Counts how often an image is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        opened = ImageRef.open

        def counted(ref: ImageRef) -> Image.Image:
            self.n += 1
            return opened(ref)

        monkeypatch.setattr(ImageRef, "open", counted)


def test_only_the_first_row_of_a_size_is_decoded(processor, examples, monkeypatch) -> None:
    wanted = [Encoder(processor, from_sizes=False).prompt(e) for e in examples]
    opened = Opened(monkeypatch)
    encoder = Encoder(processor)
    prompts = [encoder.prompt(e) for e in examples]
    assert opened.n == 1, "all images of this world have one size"
    assert prompts == wanted
    for prompt, one in zip(prompts, wanted, strict=True):
        assert all((value == one.images[name]).all() for name, value in prompt.images.items())
    assert opened.n == len(examples)
    assert len({p.image_digest for p in prompts}) == len({e.images[0].encoded() for e in examples})


def test_the_digest_changes_with_bytes_and_settings(processor, examples, tmp_path: Path) -> None:
    first, second = (
        examples[0],
        replace(examples[0], images=(ImageRef(data=examples[1].images[0].encoded()),)),
    )
    same = replace(examples[0], images=(ImageRef(data=examples[0].images[0].encoded()),))
    encoder = Encoder(processor)
    assert encoder.prompt(first).image_digest == encoder.prompt(same).image_digest
    assert encoder.prompt(first).image_digest != encoder.prompt(second).image_digest
    processor.save_pretrained(tmp_path)
    changed = type(processor).from_pretrained(tmp_path)
    changed.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert Encoder(changed).prompt(first).image_digest != encoder.prompt(first).image_digest


def test_a_cut_off_image_is_found_when_the_row_is_encoded(encoder, examples) -> None:
    data = examples[0].images[0].encoded()
    broken = replace(examples[0], images=(ImageRef(data=data[: len(data) // 2]),), where="set.jsonl:7")
    with pytest.raises(DataError, match=r"set\.jsonl:7: images: cannot be decoded"):
        encoder.encode(broken)


def damaged(data: bytes) -> bytes:
    """The PNG with a checksum of its pixels changed: header and end are those of a good file."""
    place = data.index(b"IDAT") + 8
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def test_an_image_damaged_in_its_middle_is_found_when_it_is_used(processor, examples) -> None:
    encoder = Encoder(processor)
    encoder.prompt(examples[1])
    data = damaged(examples[0].images[0].encoded())
    row = encoder.encode(replace(examples[0], images=(ImageRef(data=data),), where="set.jsonl:7"))
    with pytest.raises(DataError, match=r"set\.jsonl:7: images: cannot be decoded"):
        _ = row.prompt.images


def by_size(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose number of image tokens depends on the size of the image, in a repeated token."""
    replaced = type(processor)._process_images

    def process(self, images, **kwargs):
        outputs, texts = replaced(self, images, **kwargs)
        flat = [i for row in images for i in (row if isinstance(row, list) else [row])]
        return outputs, [text * (image.width // 10) for text, image in zip(texts, flat, strict=True)]

    monkeypatch.setattr(type(processor), "_process_images", process)


def pictured(example, width: int, place: Path):
    path = place / f"{width}.png"
    Image.new("RGB", (width, 48)).save(path)
    return replace(example, images=(ImageRef(path=path),))


def counted(rule: Callable[[int], int]) -> Callable[..., object]:
    def counts(self, image_sizes, **_):
        return type("Counts", (), {"num_image_tokens": [rule(width) for _, width in image_sizes]})()

    return counts


@pytest.mark.parametrize(("right", "opens"), [(True, CHECKED), (False, CHECKED)])
def test_rule_and_blank_images(
    processor, examples, monkeypatch, tmp_path: Path, right: bool, opens: int
) -> None:
    """With a rule that holds, further sizes cost nothing; with one that does not, a blank image each."""
    once = len(Encoder(processor).prompt(examples[0]).input_ids)
    text = processor._get_num_multimodal_tokens(image_sizes=[(48, 48)]).num_image_tokens[0]
    by_size(processor, monkeypatch)
    monkeypatch.setattr(
        type(processor),
        "_get_num_multimodal_tokens",
        counted(lambda width: text * (width // 10) if right else width),
    )
    rows = [pictured(examples[0], 20 + 10 * k, tmp_path) for k in range(CHECKED + 3)]
    opened = Opened(monkeypatch)
    runs: list[object] = []
    processed = type(processor.image_processor).__call__
    monkeypatch.setattr(
        type(processor.image_processor),
        "__call__",
        lambda self, *args, **kwargs: runs.append(1) or processed(self, *args, **kwargs),
    )
    encoder = Encoder(processor)
    lengths = [len(encoder.prompt(row).input_ids) for row in rows]
    assert lengths == [once + text * (k + 1) for k in range(len(rows))]
    assert opened.n == opens
    assert len(runs) == CHECKED + (0 if right else 3)
    images = [encoder.prompt(row).images for row in rows]  # compared with the processor
    assert len(images) == len(rows)


def test_an_image_of_another_size_than_when_encoded(processor, examples, monkeypatch, tmp_path: Path) -> None:
    by_size(processor, monkeypatch)
    encoder = Encoder(processor, cache_gb=0)
    prompt = encoder.prompt(pictured(examples[0], 30, tmp_path))
    pictured(examples[0], 40, tmp_path).images[0].path.replace(tmp_path / "30.png")
    with pytest.raises(DataError, match=r"the processor gives \d+ tokens now, and \d+ when .* was changed"):
        _ = prompt.images


def test_a_processor_that_cannot_be_stood_in_for(processor, examples, monkeypatch, caplog) -> None:
    """Every image is processed when its row is encoded, and this is said once."""
    monkeypatch.setattr(Expansions, "stand_in", lambda self, written: None)
    opened = Opened(monkeypatch)
    encoder = Encoder(processor)
    with caplog.at_level(logging.WARNING, "cwdpo"):
        found = [encoder.prompt(e) for e in examples[:4]]
    assert opened.n == 4
    assert caplog.text.count("cannot be computed from the sizes of images") == 1
    assert found == [Encoder(processor, from_sizes=False).prompt(e) for e in examples[:4]]


def test_a_stand_in_gives_the_texts_it_was_made_with(processor) -> None:
    stand_in = Expansions(processor).stand_in(Written(("<image>" * 3,)))
    made = stand_in(text=["a <image> b"], images=[[Image.new("RGB", (2, 2))]])
    ids = made["input_ids"][0]
    assert list(ids).count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 3
