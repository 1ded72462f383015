"""The validation report counts what is there, row by row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cwdpo.data.digests import DigestMap, FirstPlaces, digest8
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import count_rows, open_source
from cwdpo.data.validate.checks import ValidationReport, validate
from cwdpo.data.validate.lengths import token_counter
from cwdpo.errors import DataError


@pytest.fixture
def report(tmp_path: Path) -> ValidationReport:
    Image.effect_noise((40, 30), 90).save(tmp_path / "a.png")
    Image.new("RGB", (10, 50), "red").save(tmp_path / "b.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    base = {"prompt": "Q", "chosen": "one two three"}
    rows = [
        {**base, "image": "a.png", "rejected": "x"},
        {**base, "image": "copy.png", "rejected": "y"},  # same content: a duplicate
        {
            **base,
            "image": "b.png",
            "negatives": [{"text": "x", "kind": "hard"}, {"text": "y", "kind": "hard"}],
        },
        {**base, "images": ["a.png", "b.png"], "rejected": "w " * 12, "gentle": ["one two four"]},
        {**base, "image": "cut.png", "rejected": "x"},
        {**base, "image": "b.png", "rejected": base["chosen"]},
        {**base, "rejected": "z", "chosen": "w " * 600},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, "broken"]))
    return validate(tmp_path)


def test_counts(report: ValidationReport, tmp_path: Path) -> None:
    assert (report.format, report.rows, report.good, report.bad, report.examples) == ("trl", 8, 5, 3, 6)
    assert report.bad_fraction == 3 / 8
    assert report.columns == {
        "prompt": 7, "chosen": 7, "rejected": 6, "image": 5, "images": 1, "negatives": 1, "gentle": 1,
    }  # fmt: skip
    assert report.images_per_row == {1: 4, 2: 1, 0: 1}
    assert report.negatives_per_prompt == {
        "all": {0: 1, 1: 4, 2: 1},
        "unnamed": {0: 2, 1: 4},
        "hard": {0: 5, 2: 1},
    }
    assert report.gentle_per_prompt == {0: 5, 1: 1}
    assert report.lengths.responses == {
        "chosen": {"1-4": 5, "500-999": 1},
        "rejected": {"1-4": 5, "10-19": 1},
    }


def test_images_are_decoded_once_each(report: ValidationReport) -> None:
    assert (report.images.n, report.images.width, report.images.height) == (3, (10, 40), (30, 50))
    assert report.images.modes == {"L": 2, "RGB": 1}


def test_duplicates_are_found_by_content(report: ValidationReport, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    # Row 6 lost its negative, and says then what row 3 said.
    assert report.duplicates == 2
    assert report.first_duplicates == [(f"{file}:1", f"{file}:2"), (f"{file}:3", f"{file}:6")]


def test_problems_are_grouped(report: ValidationReport) -> None:
    found = {group.kind: (group.count, [problem.row for problem in group.first]) for group in report.problems}
    assert found == {
        "image-truncated": (1, [5]),
        "chosen-equals-rejected": (1, [6]),
        "malformed-json": (1, [8]),
    }
    assert all(group.remedy for group in report.problems)


def test_json_and_text_say_the_same(report: ValidationReport) -> None:
    data = json.loads(report.to_json())
    assert (data["rows"], data["bad"], data["negatives_per_prompt"]["hard"]) == (8, 3, {"0": 5, "2": 1})
    assert data["images"] == {
        "n": 3, "width": [10, 40], "height": [30, 50], "modes": {"L": 2, "RGB": 1}, "deep": 0, "alpha": 0, "turned": 0,
        "animated": 0,
    }  # fmt: skip
    assert {group["kind"] for group in data["problems"]} == {group.kind for group in report.problems}
    text = report.to_text()
    assert "rows 8: 5 good, 3 bad (37.5%); 6 examples" in text
    assert "images read: 3; 10 to 40 wide, 30 to 50 high (pixels); L: 2, RGB: 1" in text
    assert "words in chosen: 1-4: 5, 500-999: 1" in text
    for group in report.problems:
        assert f"{group.kind} x {group.count}" in text
        assert group.remedy in text


@pytest.mark.parametrize("level", ["none", "exists"])
def test_shallow_checks_never_open_a_file(tmp_path: Path, level: str) -> None:
    (tmp_path / "a.png").write_text("no picture")
    row = {"image": "a.png", "captions": ["one", "one"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    report = validate(tmp_path, check_images=level, captions_per_image=2)
    assert (report.good, report.images.n, report.images.width, report.duplicates) == (1, 0, None, 1)
    assert "images read" not in report.to_text()
    assert "problems: none" in report.to_text()


def test_a_set_of_nothing_but_bad_rows_is_still_a_report(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "", "rejected": "B"}))
    report = validate(tmp_path)
    assert (report.rows, report.good, report.bad, report.examples, report.lengths.responses) == (
        1,
        0,
        1,
        0,
        {},
    )
    (tmp_path / "train.jsonl").write_text("broken\nbroken\n")
    with pytest.raises(DataError, match="none of the first 2 rows can be read\n  malformed-json x 2"):
        validate(tmp_path)


# --- digests --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2**64 - 1)), max_size=300))
def test_a_digest_map_is_a_dictionary_that_keeps_the_first(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = DigestMap(), {}
    for key, value in pairs:
        spread = key << 51 | key % 7  # many collide in the low bits, which choose the slot
        assert ours.get(spread) == theirs.get(spread) == ours.add(spread, value)
        theirs.setdefault(spread, value)
    assert len(ours) == len(theirs)
    assert all(ours.get(key) == value for key, value in theirs.items())


def test_a_digest_map_grows() -> None:
    ours = DigestMap()
    digests = [digest8(str(i).encode()) for i in range(5000)]
    assert [ours.add(digest, i) for i, digest in enumerate(digests)] == [None] * 5000
    assert [ours.get(digest) for digest in digests] == list(range(5000))
    assert (len(ours), ours.get(digest8(b"x"))) == (5000, None)


def test_first_places_name_file_and_row() -> None:
    places = FirstPlaces()
    assert places.find(7) is None
    assert places.add(7, "a.jsonl", 3) is None
    assert places.add(8, "b.jsonl", 2**39) is None
    assert (places.add(7, "b.jsonl", 9), places.find(8)) == ("a.jsonl:3", f"b.jsonl:{2**39}")
    assert digest8(b"x") != digest8(b"y")


# --- repeats, leaks, lengths, pictures ------------------------------------------------------------------

ROW = {"image": "a.png", "prompt": "Q", "chosen": "one two", "rejected": "three"}


def write(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    if not (folder / "a.png").exists():
        Image.effect_noise((20, 16), 90).save(folder / "a.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def kinds(report: ValidationReport) -> dict[str, list[int]]:
    return {group.kind: [problem.row for problem in group.first] for group in report.problems}


def test_only_a_row_that_says_nothing_new_is_a_problem(tmp_path: Path) -> None:
    file = write(tmp_path, ROW, {**ROW, "rejected": "four"}, {**ROW, "note": 1}, {**ROW, "gentle": ["five"]})
    report = validate(file)
    assert (kinds(report), report.duplicates, report.good) == ({"duplicate-row": [3]}, 3, 3)


def test_leaks_are_found_by_content_and_named_on_the_training_side(tmp_path: Path) -> None:
    file = write(tmp_path, ROW, {"prompt": "Q", "chosen": "A", "rejected": "B"})
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    Image.new("RGB", (3, 3)).save(tmp_path / "other.png")
    held = [
        {**ROW, "image": "other.png"},
        {**ROW, "image": "gone.png"},
        {**ROW, "images": ["copy.png"], "image": None},
    ]
    write(tmp_path, *held, name="val.jsonl")
    write(tmp_path, {**ROW, "image": "other.png"}, name="test.jsonl")
    report = validate(tmp_path)
    assert kinds(report) == {"leak": [1]}
    assert f"is in {tmp_path / 'val.jsonl'}:3" in report.problems[0].first[0].message
    assert report.against == {str(tmp_path / "test.jsonl"): 1, str(tmp_path / "val.jsonl"): 1}
    assert kinds(validate(file, check_images="exists")) == {}, "other names, and the bytes were not read"
    assert validate(tmp_path / "test.jsonl").against == {}


def test_lengths_in_tokens_are_those_of_training(tmp_path: Path, world_folder: Path, processor: Any) -> None:
    from cwdpo.data.encode.encoder import Encoder

    encoder = Encoder(processor)
    examples = read_examples(world_folder / "train.jsonl").examples[:5]
    lines = (world_folder / "train.jsonl").read_text().splitlines()[:5]
    source = world_folder / "five.jsonl"
    source.write_text("\n".join(lines))
    longest = [encoder.encode(e).n_tokens for e in examples]
    limit = sorted(longest)[-2]
    report = validate(source, lengths=token_counter(processor), max_length=limit)
    assert (report.lengths.unit, report.lengths.longest) == ("tokens", max(longest))
    over = [i + 1 for i, n in enumerate(longest) if n > limit]
    assert over
    assert kinds(report) == {"too-long": over}
    assert report.lengths.over == len(over)
    assert sum(report.lengths.examples.values()) == 5
    assert f"over max_length {limit}: {len(over)}" in report.to_text()
    source.unlink()


def test_turned_and_animated_pictures_are_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, *({**ROW, "image": name} for name in ("a.png", "turned.jpg", "moving.gif", "a.png")))
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    report = validate(tmp_path)
    assert (report.images.n, report.images.turned, report.images.animated) == (3, 1, 1)
    assert "1 of 3 images with an EXIF orientation" in report.to_text()
    assert "1 of 3 images animated" in report.to_text()


def test_progress_is_told_and_rows_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, *({**ROW, "chosen": str(i)} for i in range(1100)))
    told: list[int] = []
    validate(file, progress=told.append)
    assert told == [500, 1000, 1100]
    assert count_rows(open_source(file)) == 1100
    pq.write_table(pa.table({"a": list(range(70))}), tmp_path / "t.parquet")
    assert count_rows(open_source(tmp_path / "t.parquet")) == 70
    (tmp_path / "l.json").write_text("[]")
    assert count_rows(open_source(tmp_path / "l.json")) is None


# --- fix ------------------------------------------------------------------------------------------------


def test_good_rows_are_written_as_they_stood(tmp_path: Path) -> None:
    odd = '{"note": 1.50, "image":"a.png",  "prompt": "Q",\t"chosen": "\\u00e9", "rejected": "B"}'
    file = write(tmp_path, ROW, {**ROW, "chosen": ""})
    file.write_text(file.read_text() + odd + "\r\n")
    report = validate(file, fix=tmp_path / "good.jsonl")
    assert (report.good, report.fixed) == (2, str(tmp_path / "good.jsonl"))
    assert (tmp_path / "good.jsonl").read_text().splitlines() == [json.dumps(ROW), odd]
    assert sorted(os.listdir(tmp_path)) == ["a.png", "good.jsonl", "train.jsonl"]


@pytest.mark.parametrize("place", ["data/sub/good.jsonl", "good.jsonl", "elsewhere/good.jsonl"])
def test_paths_of_a_fixed_file_lead_to_the_same_pictures(tmp_path: Path, place: str) -> None:
    data = tmp_path / "data"
    write(
        data,
        ROW,
        {**ROW, "image": None, "images": ["b.png", {"path": "./a.png"}]},
        {**ROW, "image": "gone.png"},
    )
    Image.new("RGB", (3, 3)).save(data / "b.png")
    out = tmp_path / place
    assert validate(data, fix=out).good == 2
    before, after = (
        [[i.encoded() for i in e.images] for e in read_examples(file, max_bad_fraction=1).examples]
        for file in (data / "train.jsonl", out)
    )
    assert before == after
    assert validate(out).problems == []
    assert (out.parent / "good_images").exists() == (place != "good.jsonl")


def test_a_fixed_file_is_written_again_after_a_kill(tmp_path: Path) -> None:
    write(tmp_path / "data", ROW)
    (tmp_path / "out").mkdir()
    piece = tmp_path / "out" / ".good.jsonl.0123456789abcdef.tmp"
    piece.write_text('{"half')
    (tmp_path / "out" / "good_images").mkdir()
    (tmp_path / "out" / "good_images" / "half.png").write_bytes(b"\x89PN")
    assert validate(tmp_path / "data", fix=tmp_path / "out" / "good.jsonl").good == 1
    assert not piece.exists()
    assert not (tmp_path / "out" / "good_images" / "half.png").exists()
    (tmp_path / "mine_images").mkdir()
    with pytest.raises(DataError, match="mine_images exists already"):
        validate(tmp_path / "data", fix=tmp_path / "mine.jsonl")


def test_pictures_of_a_table_become_files(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / "a.png").read_bytes()
    picture = {"bytes": data, "path": "../x.png"}
    rows = [
        {**ROW, "image": picture},
        {**ROW, "image": picture, "chosen": ""},
        {**ROW, "image": picture, "prompt": "R"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    report = validate(tmp_path / "t.parquet", fix=tmp_path / "good.jsonl")
    assert report.good == 2
    result = read_examples(tmp_path / "good.jsonl")
    assert [e.images[0].encoded() for e in result.examples] == [data, data]
    assert [p.suffix for p in (tmp_path / "good_images").iterdir()] == [".png"]


def test_a_set_without_a_good_row_leaves_no_file(tmp_path: Path) -> None:
    write(tmp_path, {**ROW, "chosen": ""})
    report = validate(tmp_path, fix=tmp_path / "good.jsonl")
    assert report.fixed is None
    assert sorted(os.listdir(tmp_path)) == ["a.png", "train.jsonl"]


@pytest.mark.parametrize("taken", ["good.jsonl", "good_images"])
def test_nothing_is_overwritten(tmp_path: Path, taken: str) -> None:
    write(tmp_path, ROW)
    (tmp_path / taken).mkdir()
    with pytest.raises(DataError, match="exists already"):
        validate(tmp_path, fix=tmp_path / "good.jsonl")
    assert sorted(os.listdir(tmp_path)) == sorted(["a.png", taken, "train.jsonl"])


def test_a_check_that_stops_half_way_leaves_no_file(tmp_path: Path) -> None:
    file = write(tmp_path, *({**ROW, "chosen": str(i)} for i in range(501)))

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(file, fix=tmp_path / "good.jsonl", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "train.jsonl"]
