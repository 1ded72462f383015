"""Bad rows are left out and named; too many of them, or nothing left, is an error that helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cwdpo.data.formats.base import FORMATS
from cwdpo.data.images import CHECK_LEVELS, CheckImages, ImageFolder
from cwdpo.data.problems import Problem, RowError
from cwdpo.data.read.reader import ReadResult, read_examples
from cwdpo.errors import DataError

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
BOT = "assistant"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data folder ``data`` with images good, broken and cut short; a picture outside it, and a link there."""
    data = tmp_path / "data"
    data.mkdir()
    Image.effect_noise((64, 64), 90).save(data / "good.png")
    whole = (data / "good.png").read_bytes()
    (data / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "text.png").write_text("no picture")
    (data / "empty.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    return data


def read(folder: Path, *rows: Any, **options: Any) -> ReadResult:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file = folder / "train.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return read_examples(file, **{"max_bad_fraction": 1.0, **options})


def turn(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


BAD_ROWS: list[tuple[str, str, Any, str]] = [  # kind, key, row, part of the message
    ("malformed-json", "", '{"prompt": "Q", ', "not JSON"),
    ("malformed-json", "", "[" * 100_000, "not JSON"),
    ("not-an-object", "", "[1, 2]", "list is not an object"),
    ("missing-key", "chosen", {"prompt": "Q", "rejected": "B"}, "'chosen' is missing"),
    ("missing-key", "rejected", {"prompt": "Q", "chosen": "A"}, "'rejected' is missing"),
    ("missing-key", "prompt", {"chosen": "A", "rejected": "B"}, "no 'prompt'"),
    ("missing-key", "prompt", {"completion": "A"}, "'prompt' is missing"),
    ("wrong-type", "images", {**GOOD, "images": "good.png"}, "allowed: a list of images"),
    ("wrong-type", "image", {**GOOD, "image": 3}, "int is not an image"),
    ("wrong-type", "images[0]", {**GOOD, "images": [3]}, "int is not an image"),
    ("wrong-type", "images[1]", {**GOOD, "images": ["good.png", None]}, "NoneType is not an image"),
    ("wrong-type", "image", {**GOOD, "image": {"bytes": None, "path": None}}, "dict is not an image"),
    ("two-image-keys", "images", {**GOOD, "image": "good.png", "images": ["good.png"]}, "both"),
    ("image-missing", "image", {**GOOD, "image": "gone.png"}, "no file 'gone.png'"),
    ("image-missing", "image", {**GOOD, "image": "nul\0.png"}, "nul"),
    ("image-missing", "image", {**GOOD, "image": "x" * 5000}, "no file"),
    ("image-missing", "image", {**GOOD, "image": {"bytes": "QUJD"}}, "no bytes"),
    ("image-url", "image", {**GOOD, "image": "https://example.org/a.png"}, "is a URL"),
    ("image-unreadable", "image", {**GOOD, "image": "text.png"}, "not an image"),
    ("image-unreadable", "image", {**GOOD, "image": "empty.png"}, "not an image"),
    ("image-escapes", "image", {**GOOD, "image": "../outside.png"}, "leads outside"),
    ("image-escapes", "image", {**GOOD, "image": "/etc/hostname"}, "leads outside"),
    ("image-escapes", "image", {**GOOD, "image": "link.png"}, "leads outside"),
    ("image-escapes", "image", {**GOOD, "image": {"bytes": None, "path": "../outside.png"}}, "leads outside"),
    ("empty-chosen", "chosen", {**GOOD, "chosen": " \n"}, "empty"),
    ("empty-rejected", "rejected", {**GOOD, "rejected": ""}, "left out"),
    ("empty-rejected", "rejected", {**GOOD, "rejected": []}, "left out"),
    ("empty-rejected", "rejected[1]", {**GOOD, "rejected": ["B", " "]}, "left out"),
    ("chosen-equals-rejected", "rejected", {**GOOD, "rejected": "A "}, "equals the chosen"),
    ("chosen-equals-rejected", "negatives[0]", {**GOOD, "negatives": ["A"]}, "equals the chosen"),
    ("chosen-equals-rejected", "gentle[1]", {**GOOD, "gentle": ["C", "A"]}, "equals the chosen"),
    ("image-count", "prompt", {**GOOD, "prompt": [turn([{"type": "image"}])]}, "marks 1 image places"),
    (
        "image-count",
        "prompt",
        {**GOOD, "image": "good.png", "prompt": [turn([{"type": "text", "text": "Q"}])]},
        "marks 0 image places, the row has 1",
    ),
    ("placeholder-in-text", "prompt[0].content", {**GOOD, "prompt": "<image>\nQ"}, "literal '<image>'"),
    ("placeholder-in-text", "rejected", {**GOOD, "rejected": "<|image_pad|>"}, "literal '<|image_pad|>'"),
    ("bad-text", "chosen", '{"prompt": "Q", "chosen": "\\ud800", "rejected": "B"}', "surrogate"),
    ("wrong-type", "chosen", {**GOOD, "chosen": 3}, "allowed: a string, one turn"),
    ("wrong-type", "rejected", {**GOOD, "rejected": 3}, "allowed: a string, a list of messages"),
    ("wrong-type", "rejected[1]", {**GOOD, "rejected": ["B", 3]}, "allowed"),
    ("wrong-type", "id", {**GOOD, "id": 1.5}, "allowed: a string or a whole number"),
    ("wrong-type", "references", {**GOOD, "references": "R"}, "allowed: a list of strings"),
    ("wrong-type", "negatives", {**GOOD, "negatives": "C"}, "allowed: a list"),
    ("wrong-type", "negatives[0].made", {**GOOD, "negatives": [{"text": "C", "made": "x"}]}, "an object"),
    ("unknown-key", "negatives[0].txt", {**GOOD, "negatives": [{"txt": "C"}]}, "did you mean 'text'"),
    ("unknown-origin", "gentle[0].origin", {**GOOD, "gentle": [{"text": "C", "origin": "me"}]}, "on_policy"),
    ("wrong-role", "prompt[0].role", {**GOOD, "prompt": [turn("Q", "human")]}, "allowed: system, user"),
    ("wrong-role", "prompt", {**GOOD, "prompt": [turn("Q"), turn("A", BOT)]}, "does not end in a user"),
    ("wrong-role", "prompt", {**GOOD, "prompt": []}, "does not end in a user"),
    ("wrong-role", "chosen", {**GOOD, "chosen": [turn("A")]}, "does not end in an assistant"),
    (
        "prefix-differs",
        "rejected",
        {"chosen": [turn("Q"), turn("A", BOT)], "rejected": [turn("P"), turn("B", BOT)]},
        "do not begin with the prompt",
    ),
    ("empty-prompt", "prompt", {**GOOD, "prompt": "  "}, "empty"),
    (
        "unknown-block",
        "prompt[0].content[0].type",
        {**GOOD, "prompt": [turn([{"type": "audio"}])]},
        "text, image, image_url, video",
    ),
    ("video-count", "prompt", {**GOOD, "prompt": [turn([{"type": "video"}])]}, "the row has 0 videos"),
    ("video-missing", "videos[0]", {**GOOD, "videos": ["a.mp4"]}, "no file or folder of frames 'a.mp4'"),
    ("wrong-type", "videos", {**GOOD, "videos": "a.mp4"}, "allowed: a list of videos"),
    ("wrong-type", "videos[0]", {**GOOD, "videos": [7]}, "is not a video"),
    ("video-url", "video", {**GOOD, "video": "https://example.org/a.mp4"}, "is a URL"),
    ("video-escapes", "video", {**GOOD, "video": "../a.mp4"}, "leads outside"),
    (
        "two-video-keys",
        "videos",
        {**GOOD, "video": "a.mp4", "videos": ["a.mp4"]},
        "both 'video' and 'videos'",
    ),
    (
        "image-missing",
        "prompt[0].content[0].url",
        {**GOOD, "prompt": [turn([{"type": "image", "url": "a.png"}])]},
        "no file 'a.png'",
    ),
    ("image-in-response", "chosen", {**GOOD, "chosen": [turn([{"type": "image"}], BOT)]}, "text only"),
]
NEGATIVE_ONLY = {"empty-rejected", "chosen-equals-rejected"}


@pytest.mark.parametrize(
    ("kind", "key", "row", "message"), BAD_ROWS, ids=[f"{n}-{case[0]}" for n, case in enumerate(BAD_ROWS)]
)
def test_each_problem_is_named_and_costs_no_more_than_it_must(
    folder: Path, kind: str, key: str, row: Any, message: str
) -> None:
    result = read(folder, GOOD, row, {**GOOD, "chosen": "C"}, format="trl")
    (problem,) = result.problems
    assert (problem.file, problem.row, problem.kind, problem.key) == (
        str(folder / "train.jsonl"),
        2,
        kind,
        key,
    )
    assert message in problem.message
    assert problem.remedy
    assert [e.where[-2:] for e in result.examples] == (
        [":1", ":2", ":3"] if kind in NEGATIVE_ONLY else [":1", ":3"]
    )
    assert (result.rows, result.bad_rows) == (3, 1)
    for example in result.examples:
        assert all(n.text.strip() and n.text.strip() != example.chosen.text for n in example.rejected)


@pytest.mark.parametrize(
    ("format", "kind", "row"),
    [
        ("captions", "missing-key", {"image": "good.png"}),
        ("captions", "missing-key", {"captions": ["x"]}),
        ("captions", "wrong-type", {"image": "good.png", "captions": "x"}),
        ("captions", "empty-chosen", {"image": "good.png", "captions": []}),
        ("captions", "empty-chosen", {"image": "good.png", "captions": ["x", " "]}),
        ("captions", "image-missing", {"image": "gone.png", "captions": ["x"]}),
        ("llamafactory", "wrong-role", {"conversations": [{"from": "bot", "value": "x"}]}),
        ("llamafactory", "wrong-type", {"conversations": [{"from": "human", "value": "x"}], "chosen": 3}),
        ("ms_swift", "missing-key", {"messages": [turn("Q"), turn("A", BOT)]}),
        ("rlaifv", "malformed-json", {"image": "good.png", "text": "{"}),
        ("rlaifv", "wrong-type", {"image": "good.png", "text": "[]"}),
        ("rlaifv", "missing-key", {"image": "good.png", "question": "Q", "chosen": "A"}),
    ],
)
def test_problems_of_the_other_formats(folder: Path, format: str, kind: str, row: Any) -> None:
    with pytest.raises(DataError, match=f"none of 1 rows is usable.*\n  {kind} x 1\n"):
        read(folder, row, format=format)


def test_duplicate_ids_keep_the_first(folder: Path) -> None:
    result = read(folder, {**GOOD, "id": "x"}, {**GOOD, "id": "x", "chosen": "C"})
    assert [e.chosen.text for e in result.examples] == ["A"]
    (problem,) = result.problems
    assert (problem.kind, problem.row) == ("duplicate-id", 2)
    assert f"by {folder / 'train.jsonl'}:1" in problem.message


def test_too_many_bad_rows(folder: Path) -> None:
    rows = [GOOD] * 8 + [{**GOOD, "image": "gone.png"}, {**GOOD, "chosen": ""}]
    with pytest.raises(DataError) as caught:
        read(folder, *rows, max_bad_fraction=0.1)
    text = str(caught.value)
    assert "2 of 10 rows are bad, more than data.max_bad_fraction = 0.1 allows" in text
    assert "empty-chosen x 1" in text
    assert f"{folder / 'train.jsonl'}:9 [image]: there is no file 'gone.png'" in text
    assert "or raise data.max_bad_fraction" in text
    assert len(read(folder, *rows, max_bad_fraction=0.2).examples) == 8


def test_a_row_with_two_bad_negatives_is_one_bad_row(folder: Path) -> None:
    result = read(folder, {**GOOD, "rejected": ["", "A", "B"]}, GOOD, max_bad_fraction=0.5)
    assert (len(result.problems), result.bad_rows) == (2, 1)


def test_long_lists_of_problems_are_cut(folder: Path) -> None:
    with pytest.raises(DataError, match=r"empty-chosen x 30(\n.*){5}\n    ... and 25 more\n"):
        read(folder, *[{**GOOD, "chosen": ""}] * 30)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_set_is_refused(folder: Path, content: str) -> None:
    (folder / "train.jsonl").write_text(content)
    with pytest.raises(DataError, match="no rows"):
        read_examples(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"max_bad_fraction": 1.5},
        {"limit": 0},
        {"captions_per_image": 0},
        {"check_images": "perhaps"},
        {"image_root": Path("/no/such/folder")},
    ],
)
def test_settings_out_of_range_are_refused_by_name(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        read(folder, GOOD, **options)


def test_limit_stops_reading(folder: Path) -> None:
    result = read(folder, *[GOOD] * 20, "broken", limit=3)
    assert (len(result.examples), result.rows, result.problems) == (3, 3, [])


def test_image_root_and_paths_that_stay_inside(folder: Path) -> None:
    row = {**GOOD, "images": ["outside.png", "data/link.png", "data/../outside.png"]}
    (example,) = read(folder, row, image_root=folder.parent).examples
    assert {image.path for image in example.images} == {folder.parent.resolve() / "outside.png"}


@pytest.mark.parametrize("level", CHECK_LEVELS)
def test_check_levels_see_more_and_more(folder: Path, level: CheckImages) -> None:
    seen = []
    for name in ("gone.png", "text.png", "cut.png", "good.png"):
        try:
            ImageFolder(folder, level).take(name, "image")
        except RowError as error:
            seen.append(error.kind)
    kinds = ["image-missing", "image-unreadable", "image-truncated"]
    assert seen == kinds[: CHECK_LEVELS.index(level)]


def test_bytes_and_decoded_pictures(folder: Path) -> None:
    images = ImageFolder(None, "decode")
    whole = (folder / "good.png").read_bytes()
    assert images.take({"bytes": whole, "path": "anything"}, "image").encoded() == whole
    picture = Image.effect_noise((9, 7), 50).convert("CMYK")
    again = images.take(picture, "image").open()
    assert (again.size, again.tobytes()) == ((9, 7), picture.convert("RGB").tobytes())
    with pytest.raises(RowError, match="ends too early"):
        images.take({"bytes": whole[:-600]}, "image")
    with pytest.raises(RowError, match="from the hub have no folder"):
        images.take("good.png", "image")


def test_decompression_bomb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (64 * 64 - 1, 100):  # Pillow warns above the limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        (problem,) = read(folder, GOOD, {**GOOD, "image": "good.png"}).problems
        assert problem.kind == "image-bomb"
        assert str(limit) in problem.message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    assert read(folder, {**GOOD, "image": "good.png"}).problems == []


def test_a_bad_picture_is_reported_for_each_row(folder: Path) -> None:
    problems = read(folder, GOOD, *[{**GOOD, "image": "text.png"}] * 2).problems
    assert [(p.row, p.kind) for p in problems] == [(2, "image-unreadable"), (3, "image-unreadable")]


def test_problem_reads_like_a_place() -> None:
    problem = Problem("d/a.jsonl", 3, "image", "image-missing", "there is no file 'x'", "correct the path")
    assert str(problem) == "d/a.jsonl:3 [image]: there is no file 'x'"


KNOWN_KEYS = (
    "image images prompt chosen rejected messages completion captions negatives gentle id references "
    "conversations question text rejected_response rejected_messages system completion completions label videos "
    "tools margin score_chosen score_rejected history instruction input output image_2 objects img_path weight"
)
KEYS = st.sampled_from(KNOWN_KEYS.split())
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "x"]) | LEAVES,
        "content": LEAVES
        | st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["image", "text", "image_url", "video"]), "text": LEAVES},
                optional={"image": LEAVES, "image_url": LEAVES, "path": LEAVES, "max_pixels": LEAVES},
            ),
            max_size=2,
        ),
        "from": st.sampled_from(["human", "gpt"]),
        "tool_calls": LEAVES,
        "weight": LEAVES,
        "value": LEAVES,
        "text": LEAVES,
    },
)
VALUES = st.recursive(
    LEAVES | TURNS | st.lists(TURNS, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(KEYS | st.text(max_size=4), VALUES, max_size=6).map(
    lambda row: json.dumps(row).encode()
)
LINES = st.lists(ROWS | VALUES.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=20), max_size=4)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(lines=LINES, format=st.sampled_from(["auto", *FORMATS.names()]))
def test_no_file_makes_the_reader_raise_anything_but_data_error(lines: list[bytes], format: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "train.jsonl"
        file.write_bytes(b"\n".join(lines))
        try:
            result = read_examples(file, format=format, max_bad_fraction=1.0)
        except DataError:
            return
        assert result.examples
        for example in result.examples:
            assert example.chosen.text.strip()
            assert sum(m.parts.count(None) for m in example.prompt) == len(example.images)
            assert example.prompt[-1].role == "user"


def test_importing_and_reading_load_neither_torch_nor_transformers(folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({**GOOD, "image": "good.png"}))
    code = (
        "import sys, cwdpo.data.read.reader, cwdpo.data.validate.checks, cwdpo.data.split\n"
        "loaded = sys.modules.keys() & {'torch', 'transformers', 'datasets', 'pyarrow'}\n"
        "assert not loaded, loaded\n"
        "assert len(cwdpo.data.read.reader.read_examples(sys.argv[1]).examples) == 1\n"
        "assert not sys.modules.keys() & {'torch', 'transformers'}\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.skipif(
    "CWDPO_PHOTOS" not in os.environ, reason="CWDPO_PHOTOS names no folder of captioned photographs"
)
def test_real_photographs() -> None:
    result = read_examples(os.environ["CWDPO_PHOTOS"], check_images="decode")
    lines = (Path(os.environ["CWDPO_PHOTOS"]) / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    assert (result.format, result.problems, len(result.examples)) == ("captions", [], len(lines))
    for example, line in zip(result.examples, lines, strict=True):
        assert example.chosen.text in json.loads(line)["captions"]
        assert example.id == f"{Path(json.loads(line)['image']).stem}#0"
    assert result.examples[0].images[0].open().mode == "RGB"
