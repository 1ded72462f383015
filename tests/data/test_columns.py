"""Columns that change what a row means: read, or refused by name. The tables of docs/data.md are the test's cases."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cwdpo.data.columns import MEANING, present
from cwdpo.data.facts import ImageStats
from cwdpo.data.images import ImageFolder
from cwdpo.data.media import from_base64, from_data_uri, holds_media, is_media, is_picture
from cwdpo.data.read.reader import ReadResult, read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.data.validate.checks import validate
from cwdpo.errors import DataError
from cwdpo.records import as_rgb
from cwdpo.rundir import RunDir
from cwdpo.worlds.judged import is_judgeable, scene_of
from paths import ROOT

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def table(name: str) -> list[list[str]]:
    """The cells of a table of docs/data.md, without its head."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    part = text.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0].strip()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]


def plain(cell: str) -> str:
    return cell.strip().strip("`")


COLUMNS = [(plain(c), json.loads(plain(v)), told) for cells in table("columns") for c, v, told in [cells]]
TURNS = [(plain(c), json.loads(plain(v)), told) for cells in table("turns") for c, v, told in [cells]]
MODES = [(plain(m), told) for cells in table("modes") for m, told, _ in [cells]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        Image.new("RGB", (8, 6), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.mp4").mkdir()  # a folder of frames is a video, whatever its name
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.mp4" / "0.png")
    return tmp_path


def read(folder: Path, *rows: Any, **options: Any) -> ReadResult:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(file, **{"max_bad_fraction": 1.0, **options})


def test_the_tables_hold_what_was_asked() -> None:
    assert len(COLUMNS) >= 40
    assert len(TURNS) >= 10
    assert len(MODES) >= 10
    assert {told for *_, told in [*COLUMNS, *TURNS]} <= {"refused", "used", "harmless", "no picture read"}


@pytest.mark.parametrize(("column", "value", "told"), COLUMNS, ids=[c for c, *_ in COLUMNS])
def test_a_column_is_used_or_refused(folder: Path, column: str, value: Any, told: str) -> None:
    """``no picture read``: refused in a row without a picture, listed in one that has its picture elsewhere."""
    pictured = {**GOOD, "image": "a.png"}
    image = {"image": "a.png"} if told == "refused" or column == "rejected_images" else {}
    result = read(folder, pictured, {**GOOD, **image, column: value})
    if told in ("refused", "no picture read"):
        (problem,) = result.problems
        assert (problem.file, problem.row, problem.key) == (str(folder / "train.jsonl"), 2, column)
        assert problem.kind == "column-not-read"
        assert "data.ignore_columns" in problem.remedy
        assert len(problem.remedy.split(";")[0]) > 20, "what to do instead comes first"
        assert len(result.examples) == 1
        assert len(read(folder, pictured, {**GOOD, column: value}, ignore_columns=[column]).examples) == 2
    else:
        assert result.problems == []
        assert result.notes == () if told == "used" else True
    if told == "no picture read":
        beside = read(folder, {**pictured, column: value})
        assert beside.problems == []
        assert any(f"{column} (1 rows)" in note for note in beside.notes)


def test_a_column_that_says_nothing_is_no_matter(folder: Path) -> None:
    for nothing in (None, "", [], {}):
        assert not present(nothing)
        assert read(folder, {**GOOD, "videos": nothing, "label": nothing}).problems == []
    for something in (False, 0, [0]):
        assert present(something)
    assert read(folder, GOOD, {**GOOD, "weight": 1.0, "loss_scale": [1, 1]}).problems == []


def test_what_a_row_holds_counts_whatever_its_column_is_called(folder: Path) -> None:
    png = (folder / "a.png").read_bytes()
    text = base64.b64encode(png).decode()
    for value in (text, f"data:image/png;base64,{text}", [text], f"data:video/mp4;base64,{text}"):
        (problem,) = read(folder, GOOD, {**GOOD, "image": "a.png", "thing": value}).problems
        assert (problem.kind, problem.key) == ("column-not-read", "thing")
        assert len(str(problem)) < 300
    # Rows in memory may hold bytes and pictures themselves.
    for held in ({"bytes": png, "path": None}, Image.new("L", (3, 3)), png):
        with pytest.raises(DataError, match="thing"):
            read_examples(rows_source([{**GOOD, "thing": held}], "rows"))


def test_the_scores_of_a_pair_are_its_margin(folder: Path) -> None:
    """chosen 4, rejected 1.5 and 3: margins 2.5 and 1 (hand arithmetic)."""
    row = {**GOOD, "rejected": ["B", "C"], "score_chosen": 4, "score_rejected": [1.5, 3]}
    (example,) = read(folder, row).examples
    assert [c.made["reward_margin"] for c in example.rejected] == [2.5, 1.0]
    described = {**GOOD, "margin": 0.25, "negatives": [{"text": "B", "kind": "hard"}]}
    (example,) = read(folder, described).examples
    assert [(c.kind, c.made) for c in example.rejected] == [("hard", {"reward_margin": 0.25})]
    own = {**GOOD, "margin": 0.25, "negatives": [{"text": "B", "made": {"reward_margin": 7}}]}
    assert read(folder, own).examples[0].rejected[0].made == {"reward_margin": 7}
    for wrong, said in (
        ({"score_chosen": 1}, r"\[score_rejected\]: 'score_chosen' is set, 'score_rejected' is not"),
        ({"score_rejected": 1}, r"\[score_chosen\]: 'score_rejected' is set"),
        ({"margin": "high"}, r"\[margin\]: str \('high'\); allowed: a finite number"),
        ({"margin": True}, "allowed: a finite number"),
        ({"margin": [1, 2]}, "allowed: a finite number"),
        ({"margin": 1, "reward_margin": 1}, "all give a margin of chosen"),
    ):
        with pytest.raises(DataError, match=said):
            read(folder, {**GOOD, **wrong})
    with pytest.raises(DataError, match="allowed: a finite number"):
        read_examples(rows_source([{**GOOD, "margin": float("nan")}], "rows"))


@pytest.mark.parametrize(("key", "value", "told"), TURNS, ids=[c for c, *_ in TURNS])
def test_a_key_of_a_turn_or_block_is_used_or_refused(folder: Path, key: str, value: Any, told: str) -> None:
    turn: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    holder = turn
    if key.startswith("content."):
        holder = turn["content"][0] = {"type": "image", "image": "a.png"}
        turn["content"].append({"type": "text", "text": "Q"})
    holder[key.removeprefix("content.")] = value
    result = read(folder, GOOD, {"prompt": [turn], "chosen": "A", "rejected": "B"})
    if told == "refused":
        (problem,) = result.problems
        assert problem.row == 2
        assert problem.key.endswith(f".{key.removeprefix('content.')}")
        assert problem.remedy
    else:
        assert result.problems == []


def test_the_table_of_columns_is_in_lower_case_and_finds_others(folder: Path) -> None:
    assert all(name == name.lower() for name in MEANING)
    (problem,) = read(folder, GOOD, {**GOOD, "Videos": ["a.mp4"]}).problems
    assert (problem.key, problem.kind) == ("Videos", "column-not-read")
    (problem,) = read(folder, GOOD, {**GOOD, "Image": "a.png"}).problems
    assert "a picture under a name that is not read" in problem.message


# --- modes of pictures ----------------------------------------------------------------------------------


def made(mode: str) -> Image.Image:
    """A picture of 4 x 1 pixels from dark to bright in that mode."""
    grey = [0, 85, 170, 255]
    if mode.startswith("I;16"):
        kind = ">u2" if mode == "I;16B" else "<u2"
        data = np.array([[1000, 1100, 1200, 1300]], dtype=kind).tobytes()
        return Image.frombytes(mode, (4, 1), data)
    if mode == "I":
        return Image.fromarray(np.array([[-10, 90, 190, 290]], dtype=np.int32))
    if mode == "F":
        return Image.fromarray(np.array([[0.5, 0.6, 0.7, 0.8]], dtype=np.float32))
    base = Image.new("L", (4, 1))
    base.putdata(grey)
    if mode == "1":
        return base.convert("1", dither=Image.Dither.NONE)
    if mode == "LAB":
        return Image.frombytes("LAB", (4, 1), bytes([0, 0, 0, 85, 0, 0, 170, 0, 0, 255, 0, 0]))
    if mode in ("La", "RGBa"):
        return base.convert(mode.upper()[:-1] + "A").convert(mode)
    if mode == "PA":
        return base.convert("P").convert("PA")
    return (
        base.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "HSV", "RGBX") else base.convert(mode)
    )


@pytest.mark.parametrize(("mode", "told"), MODES, ids=[m for m, _ in MODES])
def test_each_mode_of_a_picture(mode: str, told: str) -> None:
    picture = made(mode)
    assert picture.mode == mode
    expected = [0, 85, 170, 255] if mode != "1" else [0, 0, 255, 255]
    stats = ImageStats()
    ref = ImageFolder(None, "decode", stats.add).take(picture, "image")
    for shown in (as_rgb(picture), ref.open()):
        assert shown.mode == "RGB"
        red, green, blue = (np.asarray(shown)[0, :, i].tolist() for i in range(3))
        near = {"converted": 3}.get(told, 0) + 5 * (mode == "LAB")
        for channel in (red, green, blue):
            assert np.abs(np.array(channel) - expected).max() <= near
    assert stats.deep == (told == "scaled")
    assert [n for n in stats.notes() if "8 bits" in n] == (
        ["1 of 1 images with more than 8 bits per channel, each scaled from its own range to 0 to 255"]
        if told == "scaled"
        else []
    )


def test_every_mode_of_pillow_is_in_the_table() -> None:
    assert set(Image.MODES) <= {mode for mode, _ in MODES}
    assert {told for _, told in MODES} == {"as it is", "scaled", "on white", "converted"}


def test_deep_pictures_of_files_keep_their_order(tmp_path: Path) -> None:
    """Pillow's own conversion makes 1000 to 1300 all white; here they are 0, 85, 170, 255 (hand arithmetic)."""
    for name, mode in (("a.png", "I;16"), ("b.tiff", "F"), ("c.tiff", "I")):
        made(mode).save(tmp_path / name)
        (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "image": name}))
        result = read_examples(tmp_path / "train.jsonl")
        assert np.asarray(result.examples[0].images[0].open())[0, :, 0].tolist() == [0, 85, 170, 255]
        assert sum("more than 8 bits" in note for note in result.notes) == 1
        report = validate(tmp_path / "train.jsonl")
        assert (report.images.deep, report.problems) == (1, [])
        assert "1 of 1 images with more than 8 bits per channel" in report.to_text()
    assert made("I;16").convert("RGB").getextrema() == ((255, 255),) * 3, "what Pillow does"


def test_a_deep_picture_of_one_value_is_grey_and_one_without_numbers_is_refused(tmp_path: Path) -> None:
    assert as_rgb(Image.new("I;16", (2, 2), 65535)).getpixel((0, 0)) == (128, 128, 128)
    for bad in (np.nan, np.inf):
        picture = Image.fromarray(np.array([[0.0, bad]], dtype=np.float32))
        with pytest.raises(ValueError, match="not finite"):
            as_rgb(picture)
        picture.save(tmp_path / "a.tiff")
        (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "image": "a.tiff"}))
        (group,) = validate(tmp_path / "train.jsonl").problems
        assert (group.kind, group.first[0].key) == ("image-unreadable", "image")


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    """Half of a red of alpha 128 over white: 255, 255 * (1 - 128/255) = 127 (hand arithmetic)."""
    picture = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (255, 0, 0, 128))
    picture.putpixel((2, 0), (0, 0, 0, 255))
    shown = as_rgb(picture)
    assert [shown.getpixel((i, 0)) for i in range(3)] == [(255, 255, 255), (255, 127, 127), (0, 0, 0)]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "image": "p.png"}))
    result = read_examples(tmp_path / "train.jsonl")
    opened = result.examples[0].images[0].open()
    assert [opened.getpixel((i, 0)) for i in range(2)] == [(255, 255, 255), (9, 9, 9)]
    assert any("1 of 1 images with an alpha channel, put on white" in note for note in result.notes)


# --- encoded pictures -----------------------------------------------------------------------------------

KINDS = {"PNG": True, "JPEG": True, "GIF": True, "WEBP": True, "BMP": True, "TIFF": True}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_told_by_their_first_bytes(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(buffer, format=kind)
    data = buffer.getvalue()
    assert is_picture(data)
    assert from_base64(base64.b64encode(data).decode()) == data
    assert from_base64(base64.urlsafe_b64encode(data).decode().rstrip("=")) == data
    assert from_base64("\n".join(base64.encodebytes(data).decode().splitlines())) == data
    uri = f"data:image/{kind.lower()};charset=x;base64,{base64.b64encode(data).decode()}"
    assert from_data_uri(uri) == data
    assert holds_media(uri)
    (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "image": base64.b64encode(data).decode()}))
    (example,) = read_examples(tmp_path / "train.jsonl").examples
    assert example.images[0].encoded() == data


def test_other_texts_are_no_pictures(tmp_path: Path) -> None:
    for text in (
        "a/b.png",
        "x" * 5000,
        "iVBORw0KGgo",
        "What is it? " * 20,
        base64.b64encode(b"a" * 300).decode(),
    ):
        assert from_base64(text) is None
        assert from_data_uri(text) is None
        assert not holds_media(text)
    assert not is_media(b"a plain text")
    assert all(is_media(b) and not is_picture(b) for b in (b"OggS....", b"RIFF....WAVE"))
    assert from_data_uri("data:video/mp4;base64,AAAA") is None
    assert from_data_uri("data:image/png,plain") is None


@pytest.mark.parametrize(
    "value",
    [
        "x" * 38_244,
        "data:image/png;base64," + "!" * 38_244,
        {"bytes": "y" * 38_244},
        ["z" * 38_244],
        "q/" * 19_122,
    ],
)
def test_no_error_prints_a_cell_as_long_as_a_picture(tmp_path: Path, value: Any) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "image": value}))
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "train.jsonl")
    lines = str(caught.value).splitlines()
    assert any(":1 [image" in line for line in lines)
    assert max(map(len, lines)) < 1000


# --- what validate passes, train takes ------------------------------------------------------------------


@pytest.mark.parametrize("margin", ["high", True, [1], {"a": 1}, float("nan"), 10**400])
def test_a_margin_in_made_is_a_number_or_refused(folder: Path, margin: Any) -> None:
    row = {**GOOD, "negatives": [{"text": "B", "made": {"reward_margin": margin}}]}
    with pytest.raises(DataError, match=r"\[negatives\[0\]\.made\.reward_margin\].*allowed: a finite number"):
        read(folder, row)


@pytest.mark.parametrize(
    "scene", ["a street at night", ["x"], {"objects": 3}, {"objects": [], "noise_seed": "x"}, 4]
)
def test_a_scene_of_another_kind_is_a_column_like_any_other(folder: Path, scene: Any) -> None:
    example = read(folder, {**GOOD, "scene": scene}).examples[0]
    assert not is_judgeable(example)
    with pytest.raises(DataError, match="scene"):
        scene_of(example)


def test_half_a_surrogate_pair_in_a_key_can_be_written_down(folder: Path, tmp_path: Path) -> None:
    bad = {**GOOD, "videos": ["a"], "\ud800": 1}
    problems = read(folder, GOOD, bad, {**GOOD, "\udfff": "x"}, max_bad_fraction=1).problems
    run = RunDir(tmp_path)
    run.append("problems.jsonl", ({"stage": "read", "problem": str(p)} for p in problems))
    run.append("problems.jsonl", [{"\ud800": "\udfff"}])
    assert len(run.rows("problems.jsonl")) == len(problems) + 1
