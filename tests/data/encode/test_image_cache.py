"""Processed images on disk: bit-equal, never from something else, bounded, and safe beside other processes."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.encode.image_cache import ImageCache
from cwdpo.records import Completion, Example, ImageRef, Message

GB = 2.0**-30


def stored(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    return path


def example(image: Path, question: str = "What is it?") -> Example:
    turn = Message("user", (None, question))
    return Example("a", (ImageRef(path=image),), (turn,), Completion("a dog"))


def encoder(processor, folder: Path) -> Encoder:
    return Encoder(processor, cache_gb=0, on_disk=ImageCache(folder, 1.0))


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[ImageRef]:
    opened: list[ImageRef] = []
    real = ImageRef.open
    monkeypatch.setattr(ImageRef, "open", lambda self: opened.append(self) or real(self))
    return opened


def test_a_second_run_decodes_nothing_and_gets_the_same_bits(processor, image, tmp_path, monkeypatch) -> None:
    plain = Encoder(processor, cache_gb=0).prompt(example(image)).images
    first = encoder(processor, tmp_path / "cache").prompt(example(image))
    assert all(torch.equal(first.images[name], value) for name, value in plain.items())
    again = encoder(processor, tmp_path / "cache").prompt(example(image))
    opened = count_decoding(monkeypatch)
    assert again.images.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(again.images[name], value)
        assert again.images[name].dtype == value.dtype
    assert opened == []
    assert len(stored(tmp_path / "cache")) == 1


def test_another_image_edit_or_prompt_is_another_entry(processor, image, tmp_path) -> None:
    made = encoder(processor, tmp_path / "cache")
    first = made.prompt(example(image)).images["pixel_values"]
    assert made.prompt(example(image, "And what else?")).images
    assert len(stored(tmp_path / "cache")) == 2
    Image.new("RGB", (40, 30), "red").save(image)
    red = encoder(processor, tmp_path / "cache").prompt(example(image)).images["pixel_values"]
    assert not torch.equal(red, first)
    assert len(stored(tmp_path / "cache")) == 3


def test_another_processor_setting_is_another_entry(processor, image, tmp_path) -> None:
    first = encoder(processor, tmp_path / "cache").prompt(example(image)).images["pixel_values"]
    other = pickle.loads(pickle.dumps(processor))
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    second = encoder(other, tmp_path / "cache").prompt(example(image)).images["pixel_values"]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "folder"])
def test_a_damaged_file_is_made_again(processor, image, tmp_path, damage) -> None:
    cache = tmp_path / "cache"
    right = encoder(processor, cache).prompt(example(image)).images["pixel_values"]
    (path,) = stored(cache)
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]
        path.write_bytes({"cut": data[:-9], "bit": flipped, "empty": b"", "text": b"no tensors"}[damage])
    assert torch.equal(encoder(processor, cache).prompt(example(image)).images["pixel_values"], right)
    if damage != "folder":
        assert path.read_bytes() == data


def test_the_folder_is_bounded_and_the_last_used_stay(tmp_path) -> None:
    some = {"pixel_values": torch.zeros(1000)}
    cache = ImageCache(tmp_path, 20_500 * GB)  # five files of 4,000 bytes and a header
    keys = [f"{i:032x}" for i in range(6)]
    for i, key in enumerate(keys):
        cache.put(key, some)
        for path in stored(tmp_path):
            if path.stem == key:
                os.utime(path, (i + 1, i + 1))
    left = [path.stem for path in stored(tmp_path)]
    assert keys[-1] in left
    assert keys[0] not in left
    assert sum(path.stat().st_size for path in stored(tmp_path)) <= 20_500
    assert cache.get(keys[-2]) is not None
    time_of = {path.stem: path.stat().st_mtime for path in stored(tmp_path)}
    assert time_of[keys[-2]] > 1000, "an entry that was read counts as used"


def test_what_is_larger_than_the_folder_is_not_stored(tmp_path) -> None:
    ImageCache(tmp_path, 1000 * GB).put("0" * 32, {"pixel_values": torch.zeros(1000)})
    assert stored(tmp_path) == []


def test_files_of_others_are_left_alone(tmp_path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"0" * 100_000)
    cache = ImageCache(tmp_path, 9000 * GB)
    for i in range(5):
        cache.put(f"{i:032x}", {"pixel_values": torch.zeros(1000)})
    assert mine.exists()
    assert len(stored(tmp_path)) < 5


def test_temporary_files_of_killed_processes_go(tmp_path) -> None:
    cache = ImageCache(tmp_path, 1.0)
    cache.put("0" * 32, {"pixel_values": torch.zeros(10)})
    place = stored(tmp_path)[0].parent
    old, new = place / ".x.0123456789abcdef.tmp", place / ".y.0123456789abcdef.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    ImageCache(tmp_path, 1.0).put("1" * 32, {"pixel_values": torch.zeros(10)})
    assert (old.exists(), new.exists()) == (False, True)


def test_a_place_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    processor, image, tmp_path, caplog
) -> None:
    (tmp_path / "cache").write_text("a file")
    made = encoder(processor, tmp_path / "cache")
    for _ in range(2):
        assert made.prompt(example(image)).images
        assert made.prompt(example(image, "Again?")).images
    said = [r.message for r in caplog.records if "no longer stored" in r.message]
    assert len(said) == 1
    assert str(tmp_path / "cache") in said[0]


def _fill(place: tuple[str, int]) -> int:
    cache = ImageCache(Path(place[0]), 40_000 * GB)
    right = 0
    for i in range(60):
        value = i % 12
        found = cache.get(f"{value:032x}")
        if found is None:
            cache.put(f"{value:032x}", {"pixel_values": torch.full((1000,), float(value))})
        else:
            right += bool((found["pixel_values"] == value).all())
    return right


def test_processes_share_it(tmp_path) -> None:
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        found = list(pool.map(_fill, [(str(tmp_path), n) for n in range(3)]))
    assert sum(found) > 0
    for path in stored(tmp_path):
        images = ImageCache(tmp_path, 1.0).get(path.stem)
        assert images is not None
        assert images["pixel_values"].eq(int(path.stem, 16)).all()
    assert sum(path.stat().st_size for path in stored(tmp_path)) <= 40_000 * 1.06 + 3 * 4100
