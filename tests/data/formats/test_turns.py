"""Turns, content blocks and replies, in the spellings that users' data has."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.data.read.reader import ReadResult, read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.data.validate.checks import validate
from cwdpo.errors import DataError
from cwdpo.records import Example

USER, BOT = "user", "assistant"


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder: Path, *rows: Any, **options: Any) -> ReadResult:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(file, **options)


def only(result: ReadResult) -> Example:
    assert result.problems == []
    (example,) = result.examples
    return example


def colours(example: Example) -> list[tuple[int, ...]]:
    return [image.open().getpixel((0, 0)) for image in example.images]  # type: ignore[misc]


RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)
PAIR = {"chosen": "A", "rejected": "B"}


def uri(folder: Path, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": "URI"},
        {"type": "image", "base64": "B64"},
        {"type": "image_url", "image_url": {"url": "URI"}},
        {"type": "image_url", "image_url": {"url": "URI", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image", "image": "a.png", "text": None},
        {"type": "image", "image": "a.png", "text": "", "video": []},
        {"type": "image", "image": "ABSOLUTE"},
        {"type": "image", "image": "FILE"},
    ],
)
def test_a_block_carries_its_picture(folder: Path, block: dict[str, Any]) -> None:
    spelled = json.dumps(block).replace("URI", uri(folder, "a.png"))
    spelled = spelled.replace("B64", uri(folder, "a.png").partition(",")[2])
    spelled = spelled.replace("ABSOLUTE", str(folder / "a.png")).replace("FILE", f"file://{folder / 'a.png'}")
    example = only(read(folder, {"prompt": [turn(USER, [json.loads(spelled), text("Q")])], **PAIR}))
    assert example.prompt[0].parts == (None, "Q")
    assert colours(example) == [RED]


def test_pictures_of_blocks_and_of_the_column_come_in_their_order(folder: Path) -> None:
    content = [text("1"), {"type": "image", "image": "c.png"}, text("2"), {"type": "image"}, text("3")]
    content += [{"type": "image", "image": uri(folder, "b.png")}, {"type": "image"}]
    row = {"images": ["a.png", "b.png"], "prompt": [turn(USER, content)], **PAIR}
    example = only(read(folder, row))
    assert example.prompt[0].parts == ("1", None, "2", None, "3", None, None)
    assert colours(example) == [GREEN, RED, BLUE, BLUE]
    with pytest.raises(DataError, match="marks 2 image places, the row has 1 images"):
        read(folder, {**row, "images": ["a.png"]})


def test_pictures_of_earlier_turns_and_repeated_prompts(folder: Path) -> None:
    start = [
        turn("system", "Be brief."),
        turn(USER, [{"type": "image", "image": "a.png"}, text("Q")]),
        turn(BOT, "red"),
        turn(USER, [text("And this?"), {"type": "image", "image": "b.png"}]),
    ]
    row = {"chosen": [*start, turn(BOT, "A")], "rejected": [*start, turn(BOT, "B")]}
    assert colours(only(read(folder, row))) == [RED, BLUE]
    other = json.loads(json.dumps(row).replace("b.png", "c.png", 1))
    with pytest.raises(DataError, match="do not begin with the prompt"):
        read(folder, other)


def test_pictures_in_memory_and_in_tables(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    png = (folder / "a.png").read_bytes()
    for value in (Image.open(folder / "a.png"), png, {"bytes": png, "path": None}):
        row = {"prompt": [turn(USER, [{"type": "image", "image": value}, text("Q")])], **PAIR}
        assert colours(only(read_examples(rows_source([row], "rows")))) == [RED]
    content = [
        {"type": "image", "image": {"bytes": png, "path": "x.png"}, "text": None},
        {"type": "text", "image": None, "text": "Q"},
    ]
    pq.write_table(pa.Table.from_pylist([{"prompt": [turn(USER, content)], **PAIR}]), folder / "t.parquet")
    assert colours(only(read_examples(folder / "t.parquet"))) == [RED]


def test_a_saved_data_set_with_pictures_in_its_blocks(folder: Path, tmp_path: Path) -> None:
    """``datasets`` never decodes: neither at the top nor inside the blocks."""
    import datasets

    png = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    features = datasets.Features(
        prompt=[{"role": datasets.Value("string"),
                 "content": [{"type": datasets.Value("string"), "text": datasets.Value("string"),
                              "image": datasets.Image()}]}],
        chosen=datasets.Value("string"), rejected=datasets.Value("string"),
    )  # fmt: skip
    content = [{"type": "image", "text": None, "image": png}, {"type": "text", "text": "Q", "image": None}]
    rows = [{"prompt": [turn(USER, content)], **PAIR}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    example = only(read_examples(tmp_path / "saved"))
    assert example.images[0].data == png["bytes"]


@pytest.mark.parametrize(
    ("block", "key", "message"),
    [
        ({"type": "image", "image": "https://example.org/a.png"}, "image", "is a URL"),
        ({"type": "image_url", "image_url": {"url": "http://x/a.png"}}, "image_url.url", "is a URL"),
        ({"type": "image_url"}, "image_url", "names no picture"),
        (
            {"type": "image_url", "image_url": {"url": "data:video/mp4;base64,AAAA"}},
            "image_url.url",
            "not a data URI",
        ),
        ({"type": "image", "image": "../x.png"}, "image", "leads outside"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, "image", "image and path are both set"),
        ({"type": "video", "video": "a.mp4"}, "video", "no file or folder of frames 'a.mp4'"),
        ({"type": "video", "video": "a.mp4", "path": "b.mp4"}, "video", "video and path are both set"),
        ({"type": "video", "video": "a.mp4", "fps": 2}, "fps", "read without it"),
        ({"type": "input_audio", "input_audio": {}}, "type", "'input_audio'"),
        ({"type": "tool_use", "name": "f"}, "type", "'tool_use'"),
        ({"type": ["image"]}, "type", "allowed: text, image"),
    ],
)
def test_a_block_that_cannot_be_read_is_named(folder: Path, block: Any, key: str, message: str) -> None:
    row = {"prompt": [turn(USER, [block, text("Q")])], **PAIR}
    (problem,) = read(folder, PAIR | {"prompt": "Q"}, row, max_bad_fraction=1).problems
    assert problem.key == f"prompt[0].content[0].{key}"
    assert message in problem.message


@pytest.mark.parametrize(
    "prompt",
    [
        "<image>\nQ",
        [turn(USER, "<image>\nQ")],
        [turn(USER, [text("<image>\nQ")])],
    ],
)
def test_tags_in_trl_s_texts_count_where_they_agree(folder: Path, prompt: Any) -> None:
    example = only(read(folder, {"image": "a.png", "prompt": prompt, **PAIR}))
    assert example.prompt[0].parts == (None, "Q")
    with pytest.raises(DataError, match=r"marks 1 places with '<image>', the row has 2 images"):
        read(folder, {"images": ["a.png", "b.png"], "prompt": prompt, **PAIR})
    with pytest.raises(DataError, match="literal '<image>'"):
        read(folder, {"prompt": prompt, **PAIR})
    with pytest.raises(DataError, match="literal '<image>'"):
        read(folder, {"image": "a.png", "prompt": prompt, **PAIR, "rejected": "<image>B"})


def test_tags_in_a_whole_conversation(folder: Path) -> None:
    start = [turn(USER, "First <image> or <image>?")]
    row = {
        "chosen": [*start, turn(BOT, "A")],
        "rejected": [*start, turn(BOT, "B")],
        "images": ["a.png", "b.png"],
    }
    assert only(read(folder, row)).prompt[0].parts == ("First ", None, " or ", None, "?")


@pytest.mark.parametrize("columns", ["trl", "llamafactory", "rlaifv"])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([turn(BOT, "A")], [turn(BOT, "B")]),
        (turn(BOT, "A"), turn(BOT, "B")),
        ([{"from": "gpt", "value": "A"}], [{"from": "gpt", "value": "B"}]),
        ("A", [turn(BOT, "B")]),
    ],
)
def test_a_response_may_be_one_turn_or_a_list_of_one(
    folder: Path, columns: str, chosen: Any, rejected: Any
) -> None:
    prompt = {
        "trl": {"prompt": "Q"},
        "llamafactory": {"conversations": [{"from": "human", "value": "Q"}]},
        "rlaifv": {"question": "Q"},
    }[columns]
    result = read(folder, {**prompt, "chosen": chosen, "rejected": rejected})
    assert result.format == columns
    example = only(result)
    assert (example.chosen.text, [n.text for n in example.rejected]) == ("A", ["B"])


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"image": "a.png", "question": "<image>\nQ"}, (None, "Q")),
        ({"image": "a.png", "question": "Q"}, (None, "Q")),
        ({"image": ["a.png", "b.png"], "question": "Image-1: <image>\nImage-2: <image>\nQ"},
         ("Image-1: ", None, "Image-2: ", None, "Q")),
        ({"image": ["a.png", "b.png"], "question": "Q"}, (None, None, "Q")),
        ({"question": "Q"}, ("Q",)),
        ({"image": [], "question": "Q"}, ("Q",)),
        ({"image": "", "question": "Q"}, ("Q",)),
    ],
)  # fmt: skip
def test_rows_of_mmpr(folder: Path, row: dict[str, Any], parts: tuple[str | None, ...]) -> None:
    result = read(folder, {"id": 3, **row, **PAIR})
    assert result.format == "rlaifv"
    assert only(result).prompt[0].parts == parts


def test_mmpr_rows_whose_counts_differ_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"\[question\]: the text marks 1 places .* the row has 2 images"):
        read(folder, {"image": ["a.png", "b.png"], "question": "<image>Q", **PAIR})


def test_system_columns_where_their_tool_reads_them(folder: Path) -> None:
    row = {"messages": [turn(USER, "Q"), turn(BOT, "A")], "rejected_response": "B", "system": "Be brief."}
    example = only(read(folder, row))
    assert [m.role for m in example.prompt] == ["system", "user"]
    said = {"conversations": [{"from": "human", "value": "Q"}], "history": [["x", "y"]], **PAIR}
    with pytest.raises(DataError, match=r"\[history\]: earlier turns beside a conversation"):
        read(folder, said)


@pytest.mark.parametrize("place", ["good.jsonl", "elsewhere/good.jsonl"])
def test_pictures_of_blocks_are_found_from_a_fixed_file_too(folder: Path, place: str) -> None:
    data = folder / "data"
    data.mkdir()
    for name in "ab":
        (folder / f"{name}.png").rename(data / f"{name}.png")
    rows = [
        {"prompt": [turn(USER, [{"type": "image", "image": "a.png"}, text("Q")])], **PAIR},
        {"images": ["b.png"], "prompt": [turn(USER, [{"type": "image"}, text("R")])], **PAIR},
        {"prompt": [turn(USER, [{"type": "image", "image": uri(data, "a.png")}, text("S")])], **PAIR},
        {"prompt": "T", "chosen": "", "rejected": "B"},
    ]
    file = data / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate(file, fix=folder / place)
    assert (report.good, report.bad) == (3, 1)
    assert [colours(e) for e in read_examples(folder / place).examples] == [[RED], [BLUE], [RED]]


def test_a_leak_through_a_block_is_found(folder: Path) -> None:
    row = {"prompt": [turn(USER, [{"type": "image", "image": "a.png"}, text("Q")])], **PAIR}
    (folder / "val.jsonl").write_text(json.dumps({**row, "chosen": "C"}))
    read(folder, row)
    report = validate(folder / "train.jsonl")
    assert [group.kind for group in report.problems] == ["leak"]


@pytest.mark.parametrize(
    ("role", "remedy"),
    [
        (
            "observation",
            "write calls as 'tool_calls' of an assistant turn, and what the tool gave as a turn of the role 'tool'",
        ),
        ("developer", "call it system, if it says how to answer"),
        ("human", "call it user"),
        ("narrator", "rename the role, or drop the row"),
    ],
)
def test_a_role_of_another_tool_is_answered(folder: Path, role: str, remedy: str) -> None:
    row = {"prompt": [turn(USER, "Q"), turn(role, "x"), turn(USER, "R")], **PAIR}
    (problem,) = read(folder, PAIR | {"prompt": "Q"}, row, max_bad_fraction=1).problems
    assert (problem.kind, problem.key, problem.remedy) == ("wrong-role", "prompt[1].role", remedy)
