"""Image-side negatives: their sources, their images, rows that have them, and a run with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cwdpo.config import parse_recipe
from cwdpo.data.read.reader import read_examples
from cwdpo.data.split import split_by_image
from cwdpo.errors import RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.negatives.base import NEGATIVES
from cwdpo.negatives.image_side import with_image_negatives
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.preferences import trl_rows
from cwdpo.pipeline.inputs import of_rows
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.records import Completion, Example, ImageEdit, ImageRef, Message

SOURCES = ("image_crop", "image_noise", "image_swap")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in "abcd":
        pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def an_example(folder: Path, *names: str, chosen: str = "a cat") -> Example:
    images = tuple(ImageRef(path=folder / f"{n}.png") for n in names)
    prompt = (Message("user", (*[None] * len(images), "What?")),)
    return Example("-".join(names) or "text", images, prompt, Completion(chosen), (Completion("a dog"),))


# --- edits --------------------------------------------------------------------------------------------------


def test_a_crop_is_the_region_scaled_to_the_whole_size(pictures: Path) -> None:
    whole = Image.open(pictures / "a.png")
    cropped = ImageRef(path=pictures / "a.png", edit=ImageEdit(box=(0.25, 0.5, 0.75, 1.0))).open()
    wanted = whole.crop((10, 12, 30, 24)).resize((40, 24), Image.Resampling.BICUBIC)
    assert cropped.size == whole.size
    # `resize(box=...)` may look one pixel beyond the region where the filter reaches over its edge.
    assert np.abs(np.asarray(cropped, float) - np.asarray(wanted, float))[4:-4, 4:-4].max() <= 1


def test_noise_has_its_variance_and_the_image_its_share(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), (160, 160, 160)).save(tmp_path / "grey.png")
    noisy = ImageRef(path=tmp_path / "grey.png", edit=ImageEdit(noise=0.04, seed=3)).open()
    values = np.asarray(noisy, float) / 127.5 - 1
    assert values.mean() == pytest.approx(np.sqrt(0.96) * (160 / 127.5 - 1), abs=0.005)
    assert values.std() == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("edit", [{"box": (0.5, 0, 0.5, 1)}, {"box": (0, 0, 1.1, 1)}, {"noise": 1.5}])
def test_an_edit_that_is_none(edit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="left < right"):
        ImageEdit(**edit)


def test_encoded_bytes_are_those_of_the_edited_image(pictures: Path) -> None:
    plain = ImageRef(path=pictures / "a.png")
    edited = ImageRef(path=pictures / "a.png", edit=ImageEdit(noise=0.5))
    assert plain.encoded() == (pictures / "a.png").read_bytes()
    (pictures / "e.png").write_bytes(edited.encoded())
    assert np.array_equal(Image.open(pictures / "e.png"), edited.open())


# --- sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_changes_the_images_only(pictures: Path, name: str) -> None:
    example = an_example(pictures, "a", "b")
    pool = [example, an_example(pictures, "c", "d", chosen="a house"), an_example(pictures, "c")]
    source = NEGATIVES.build(name)
    (made,) = source.completions(example, pool, random.Random(5))
    assert (made.text, made.kind) == ("a cat", name)
    assert made.images is not None
    assert len(made.images) == 2
    assert all(one != other for one, other in zip(made.images, example.images, strict=True))
    assert [i.open().size for i in made.images] == [(40, 24)] * 2
    assert source.completions(example, pool, random.Random(5)) == [made]
    assert source.completions(example, pool, random.Random(6)) != [made] or name == "image_swap"
    assert source.completions(an_example(pictures), pool, random.Random(5)) == []


def test_crops_have_their_area(pictures: Path) -> None:
    example, source = an_example(pictures, "a"), NEGATIVES.build({"name": "image_crop", "area": [0.05, 0.1]})
    areas = []
    for seed in range(200):
        (made,) = source.completions(example, [], random.Random(seed))
        assert made.images is not None
        assert made.images[0].edit is not None
        left, top, right, bottom = made.images[0].edit.box
        areas.append((right - left) * (bottom - top))
    assert 0.05 - 1e-9 <= min(areas) < 0.06
    assert 0.09 < max(areas) <= 0.1 + 1e-9


def test_swapped_images_are_not_those_that_chosen_is_true_of(pictures: Path) -> None:
    example = an_example(pictures, "a")
    same = an_example(pictures, "b", chosen="A cat")
    true = Example(**{**vars(an_example(pictures, "c", chosen="a pet")), "references": ("a  CAT",)})
    fine = an_example(pictures, "d", chosen="a house")
    source = NEGATIVES.build("image_swap")
    found = {
        source.completions(example, [example, same, true, fine], random.Random(s))[0].made["of"]
        for s in range(20)
    }
    assert found == {"d"}
    assert source.completions(example, [example, same, true], random.Random(0)) == []


def test_the_mix_adds_to_the_negatives_that_are_there(pictures: Path) -> None:
    examples = [an_example(pictures, n, chosen=f"a {n}") for n in "abcd"] + [an_example(pictures)]
    settings = NegativeSettings(image_mix={"image_crop": 0.5, "image_swap": 0.5}, image_per_prompt=2)
    made = with_image_negatives(examples, settings, 3)
    assert [e.rejected[0] for e in made] == [e.rejected[0] for e in examples]
    assert [len(e.rejected) for e in made] == [3, 3, 3, 3, 1]
    assert {c.kind for e in made for c in e.rejected[1:]} == {"image_crop", "image_swap"}
    assert all(len({c.images for c in e.rejected}) == len(e.rejected) for e in made)
    assert with_image_negatives(examples[::-1], settings, 3) == made[::-1]
    assert with_image_negatives(examples, NegativeSettings(), 3) == examples


def test_a_text_source_in_the_image_mix() -> None:
    tree = {"data": {"path": "x"}, "negatives": {"image_mix": {"shuffled": 1.0}}}
    with pytest.raises(
        RecipeError, match=r"shuffled changes the text; allowed: image_crop, image_noise, image_swap"
    ):
        parse_recipe(tree)
    with pytest.raises(RecipeError, match=r"0 < smallest <= largest"):
        parse_recipe(
            {
                **tree,
                "negatives": {"mix": {"image_crop": 1}, "settings": {"image_crop": {"area": [0.5, 0.2]}}},
            }
        )


# --- rows ---------------------------------------------------------------------------------------------------


def rows_of(folder: Path, *rows: dict[str, Any]) -> list[Example]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, max_bad_fraction=1.0).examples


SWIFT = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a cat"}],
}
TRL = {"images": ["a.png"], "prompt": "What?", "chosen": "a cat"}
REJECTED_CHAT = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a dog"}]


@pytest.mark.parametrize(
    ("row", "text", "images"),
    [
        ({**SWIFT, "rejected_images": ["b.png"]}, "a cat", ["b.png"]),
        ({**SWIFT, "rejected_response": "a dog", "rejected_images": ["b.png"]}, "a dog", ["b.png"]),
        ({**SWIFT, "rejected_messages": REJECTED_CHAT, "rejected_images": ["b.png"]}, "a dog", ["b.png"]),
        ({**SWIFT, "rejected_messages": REJECTED_CHAT, "rejected_images": ["a.png"]}, "a dog", None),
        ({**TRL, "rejected_images": ["b.png"]}, "a cat", ["b.png"]),
        ({**TRL, "rejected": "a dog", "rejected_images": ["b.png"]}, "a dog", ["b.png"]),
        ({**TRL, "negatives": [{"text": "a cat", "images": ["b.png"]}]}, "a cat", ["b.png"]),
    ],
)
def test_rows_with_images_of_the_rejected_side(
    pictures: Path, row: dict[str, Any], text: str, images: list[str] | None
) -> None:
    (example,) = rows_of(pictures, row)
    (negative,) = example.rejected
    found = None if negative.images is None else [i.path.name for i in negative.images if i.path]
    assert (negative.text, found, negative.kind) == (text, images, "" if images is None else "image")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**SWIFT, "rejected_images": ["b.png", "c.png"]},
            "the rejected side has 2 images, the prompt has 1",
        ),
        ({**SWIFT, "rejected_images": ["a.png"]}, "the negative equals the chosen response"),
        ({**SWIFT, "rejected_images": "b.png"}, "rejected_images"),
        ({**SWIFT, "rejected_images": ["no.png"]}, "[rejected_images[0]]: there is no file"),
        ({**TRL, "negatives": [{"text": "a cat", "images": "b.png"}]}, "negatives[0].images"),
        (
            {
                **TRL,
                "negatives": [{"text": "a", "images": [{"path": "b.png", "edit": {"box": [0, 0, 2, 1]}}]}],
            },
            "negatives[0].images[0].edit",
        ),
    ],
)
def test_rows_that_are_refused(pictures: Path, row: dict[str, Any], message: str) -> None:
    path = pictures / "rows.jsonl"
    good = {**SWIFT, "rejected_response": "a dog"} if "messages" in row else {**TRL, "rejected": "a dog"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
    result = read_examples(path, max_bad_fraction=1.0)
    assert message in str(result.problems[0])
    assert str(result.problems[0]).startswith(f"{path}:1")


@pytest.mark.parametrize("name", SOURCES)
def test_written_negatives_are_read_again(pictures: Path, name: str) -> None:
    example = an_example(pictures, "a")
    pool = [example, an_example(pictures, "b", chosen="a house")]
    (negative,) = NEGATIVES.build(name).completions(example, pool, random.Random(1))
    (again,) = rows_of(pictures, {**TRL, "negatives": [negative.as_row()]})
    assert again.rejected[0].images == negative.images
    held = [ImageRef(data=(pictures / "a.png").read_bytes(), edit=negative.images[0].edit)]  # type: ignore[index]
    (again,) = rows_of(pictures, {**TRL, "negatives": [Completion("a cat", images=tuple(held)).as_row()]})
    assert np.array_equal(again.rejected[0].images[0].open(), held[0].open())  # type: ignore[index]


def test_preference_files_have_the_images(pictures: Path) -> None:
    from cwdpo.onpolicy.preferences import _write_jsonl, _write_parquet

    example = an_example(pictures, "a")
    (crop,) = NEGATIVES.build("image_crop").completions(example, [], random.Random(1))
    rows = list(trl_rows([Example(**{**vars(example), "rejected": (Completion("a dog"), crop)})]))
    assert crop.images is not None
    _write_jsonl(pictures / "pairs.jsonl", rows)
    _write_parquet(pictures / "pairs.parquet", rows)
    for name in ("pairs.jsonl", "pairs.parquet"):
        text, image = (e.rejected[0] for e in read_examples(pictures / name).examples)
        assert (text.text, text.images) == ("a dog", None)
        assert image.images is not None
        assert np.array_equal(image.images[0].open(), crop.images[0].open()), name


def test_an_image_of_a_negative_is_in_no_other_split(pictures: Path) -> None:
    other = Completion("a cat", images=(ImageRef(path=pictures / "b.png"),))
    examples = [
        Example(**{**vars(an_example(pictures, "a")), "rejected": (other,)}),
        *[an_example(pictures, n) for n in "bcd"],
    ]
    for seed in range(12):
        parts = split_by_image(examples, {"train": 0.5, "test": 0.5}, seed)
        ids = [{e.id for e in part} for part in parts.values()]
        assert any({"a", "b"} <= part for part in ids)


def test_other_images_of_negatives_are_other_inputs(pictures: Path) -> None:
    edits = (None, ImageEdit(noise=0.5), ImageEdit(noise=0.25))
    refs = [ImageRef(path=pictures / "b.png", edit=edit) for edit in edits] + [
        ImageRef(path=pictures / "c.png")
    ]
    made = [Completion("a cat", images=(ref,)) for ref in refs]
    rows = [[Example(**{**vars(an_example(pictures, "a")), "rejected": (c,)})] for c in made]
    assert len({of_rows(one)["pictures"] for one in rows}) == 4


def test_prompts_of_edited_images_have_digests_of_their_own(pictures: Path, encoder: Any) -> None:
    example = an_example(pictures, "a", chosen="a red ring .")
    crops = [NEGATIVES.build("image_crop").completions(example, [], random.Random(s))[0] for s in (1, 2)]
    swapped = Completion("a red ring .", images=(ImageRef(path=pictures / "b.png"),))
    encoded = encoder.encode(Example(**{**vars(example), "rejected": (*crops, swapped)}))
    assert len({p.image_digest for p in encoded.prompts}) == 4
    tensors = [next(iter(p.images.values())) for p in encoded.prompts]
    assert all(not (a == b).all() for i, a in enumerate(tensors) for b in tensors[:i])


# --- a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [False, True])
def test_a_run_with_pairs_of_both_sides(world_folder: Path, tmp_path: Path, rounds: bool) -> None:
    negatives: dict[str, Any] = {"image_mix": dict.fromkeys(SOURCES, 1.0), "image_per_prompt": 2}
    if rounds:
        negatives |= {"on_policy_fraction": 0.5, "rounds": 2, "sampler": {"max_new_tokens": 30}}
    recipe = parse_recipe(
        {
            "model": {"path": "embedded", "device": "cpu"},
            "data": {
                "path": str(world_folder / "train.jsonl"),
                "validation_path": str(world_folder / "validation.jsonl"),
            },
            "negatives": negatives,
            "stage1": {"enabled": False},
            "stage2": {"objective": {"name": "cw_dpo"}, "learning_rate": 1e-4, "steps": 2},
            "train": {"batch_size": 4, "logging_steps": 1},
            "calibration": {"samples": 4, "max_new_tokens": 20},
            "probes": {"every": 2, "prompts": 6, "types": ["rejected_paraphrase", "shuffled"]},
            "evaluation": {"prompts": 0},
        }
    )
    train_two_stage(recipe, tmp_path / "run")
    logged = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "pairs/image_side" in row]
    assert len(logged) == 2
    for row in logged:
        assert 0 < row["pairs/image_side"] < 1
        assert {"rewards/margins/image", "rewards/margins/text", "logps_mean/rejected/image"} <= set(row)
        assert any(key.startswith("cooling/weight/image_") for key in row)
    read = {row["name"] for row in read_jsonl(tmp_path / "run" / "readings.jsonl")}
    assert {name for name in read if "image_crop" in name}
    if rounds:
        pairs = [p for r in read_jsonl(tmp_path / "run" / "rounds.jsonl") for p in r["pairs"]]
        assert any(p.get("rejected_image") for p in pairs)
