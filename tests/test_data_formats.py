"""Each format, read from a hand-made file, gives the Examples that its rows mean."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.data.formats import FORMATS
from cwdpo.data.read import ReadResult, read_examples
from cwdpo.errors import DataError
from cwdpo.records import Completion, Example, Message

USER, BOT = "user", "assistant"


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def picture(path: Path, size: tuple[int, int] = (8, 6), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "blue").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png", colour="green")
    return tmp_path


def read(folder: Path, *rows: Any, **options: Any) -> ReadResult:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_examples(file, **options)


def only(result: ReadResult) -> Example:
    assert result.problems == []
    (example,) = result.examples
    return example


BLOCKS = [{"type": "image"}, {"type": "text", "text": "What is this?"}]


@pytest.mark.parametrize(
    "prompt",
    ["What is this?", [turn(USER, "What is this?")], [turn(USER, BLOCKS)]],
    ids=["string", "message", "blocks"],
)
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("a dog", "a cat"),
        ([turn(BOT, "a dog")], [turn(BOT, "a cat")]),
        ([turn(BOT, [{"type": "text", "text": "a dog"}])], [turn(BOT, [{"type": "text", "text": "a cat"}])]),
    ],
    ids=["strings", "messages", "blocks"],
)
@pytest.mark.parametrize(
    "images", [{"image": "images/a.png"}, {"images": ["images/a.png"]}], ids=["one", "list"]
)
def test_trl_spellings_mean_the_same(
    folder: Path, prompt: Any, chosen: Any, rejected: Any, images: dict[str, Any]
) -> None:
    result = read(folder, {"prompt": prompt, "chosen": chosen, "rejected": rejected, **images})
    example = only(result)
    assert result.format == "trl"
    assert example.prompt == (Message("user", (None, "What is this?")),)
    assert (example.chosen, example.rejected) == (Completion("a dog"), (Completion("a cat"),))
    assert [image.path for image in example.images] == [(folder / "images" / "a.png").resolve()]
    assert example.id == "train#1"
    assert example.where == f"{folder / 'train.jsonl'}:1"


def test_trl_implicit_prompt_is_the_shared_conversation(folder: Path) -> None:
    start = [turn("system", "Be brief."), turn(USER, "Hello"), turn(BOT, "Hi"), turn(USER, "Colour?")]
    row = {
        "images": ["images/a.png"],
        "chosen": [*start, turn(BOT, "red")],
        "rejected": [*start, turn(BOT, "blue")],
    }
    example = only(read(folder, row))
    # Bare strings: the picture goes in front of the FIRST user turn.
    assert example.prompt == (
        Message("system", ("Be brief.",)),
        Message("user", (None, "Hello")),
        Message("assistant", ("Hi",)),
        Message("user", ("Colour?",)),
    )
    assert example.chosen.text == "red"
    assert [n.text for n in example.rejected] == ["blue"]


def test_trl_marked_places_are_kept_in_order(folder: Path) -> None:
    content = [
        {"type": "text", "text": "First"},
        {"type": "image"},
        {"type": "text", "text": "or"},
        {"type": "image"},
    ]
    images = ["images/a.png", "images/b.png"]
    example = only(
        read(folder, {"images": images, "prompt": [turn(USER, content)], "chosen": "1", "rejected": "2"})
    )
    assert example.prompt[0].parts == ("First", None, "or", None)
    assert [image.path.name for image in example.images if image.path] == ["a.png", "b.png"]


def test_trl_chosen_may_repeat_the_prompt(folder: Path) -> None:
    row = {"prompt": "Why?", "chosen": [turn(USER, "Why?"), turn(BOT, "So.")], "rejected": [turn(BOT, "No.")]}
    example = only(read(folder, row))
    assert (example.chosen.text, example.rejected[0].text, len(example.prompt)) == ("So.", "No.", 1)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn(USER, "Look"), turn(BOT, "a dog")], "images": ["images/a.png"]},
        {"prompt": "Look", "completion": "a dog", "image": "images/a.png"},
        {"prompt": [turn(USER, "Look")], "completion": [turn(BOT, "a dog")], "image": "images/a.png"},
    ],
)
def test_trl_sft_forms_have_no_negatives(folder: Path, row: dict[str, Any]) -> None:
    example = only(read(folder, row))
    assert example.prompt == (Message("user", (None, "Look")),)
    assert (example.chosen.text, example.rejected, example.gentle) == ("a dog", (), ())


def test_trl_with_our_columns(folder: Path) -> None:
    row = {
        "id": 7,
        "prompt": "Look",
        "chosen": "a red dog",
        "rejected": ["a cat", "a cow"],
        "negatives": [
            {"text": "a blue dog", "kind": "hard", "origin": "perturbed", "made": {"edit": "colour"}}
        ],
        "gentle": ["a red puppy"],
        "references": ["a dog, red"],
        "scene": {"shapes": [1, 2]},
        "image": None,
    }
    example = only(read(folder, row))
    assert example.id == "7"
    assert [n.text for n in example.rejected] == ["a cat", "a cow", "a blue dog"]
    assert example.rejected[2] == Completion("a blue dog", "perturbed", "hard", {"edit": "colour"})
    assert example.gentle == (Completion("a red puppy"),)
    assert example.references == ("a dog, red",)
    assert example.extra == {"scene": {"shapes": [1, 2]}}


def test_trl_rejected_may_be_left_out_for_negatives(folder: Path) -> None:
    assert only(read(folder, {"prompt": "Q", "chosen": "A", "negatives": ["B"]})).rejected == (
        Completion("B"),
    )


CAPTIONS = ["one dog", "two dogs", "three dogs", "four dogs"]


def test_captions(folder: Path) -> None:
    row = {"image": "images/a.png", "captions": CAPTIONS, "source": "web"}
    result = read(folder, row, default_prompt="Say what you see.")
    example = only(result)
    assert result.format == "captions"
    assert example.id == "a#0"
    assert example.prompt == (Message("user", (None, "Say what you see.")),)
    assert example.chosen.text in CAPTIONS
    assert example.references == tuple(CAPTIONS)
    assert example.extra == {"source": "web"}


def test_captions_draw_hangs_on_the_picture_alone(folder: Path) -> None:
    rows = [{"image": f"images/{n}.png", "captions": CAPTIONS} for n in "ab"]
    forward, backward = read(folder, *rows), read(folder, *reversed(rows))
    chosen = {e.id: e.chosen.text for e in forward.examples}
    assert chosen == {e.id: e.chosen.text for e in backward.examples}
    more = read(folder, *rows, captions_per_image=3).examples
    assert [e.id for e in more] == ["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]
    assert {e.id: e.chosen.text for e in more if e.id in chosen} == chosen
    assert len({e.chosen.text for e in more[:3]}) == 3
    assert len(read(folder, *rows, captions_per_image=9).examples) == 8


def test_captions_draw_uses_all_positions(folder: Path) -> None:
    rows = [{"id": str(i), "image": "images/a.png", "captions": CAPTIONS} for i in range(60)]
    assert {e.chosen.text for e in read(folder, *rows).examples} == set(CAPTIONS)


def test_captions_id_falls_back_to_the_row(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "c.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": png(), "path": None}, "captions": ["x"]}]), file)
    assert only(read_examples(file)).id == "c#1#0"


@pytest.mark.parametrize(
    "chosen", [{"from": "gpt", "value": "a dog"}, {"role": BOT, "content": "a dog"}, "a dog"]
)
def test_llamafactory_ranking(folder: Path, chosen: Any) -> None:
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}],
        "chosen": chosen,
        "rejected": {"from": "gpt", "value": "a cat"},
        "images": ["images/a.png"],
    }
    result = read(folder, row)
    example = only(result)
    assert result.format == "llamafactory"
    assert example.prompt == (Message("system", ("Be brief.",)), Message("user", (None, "What is this?")))
    assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))
    assert example.extra == {}


def test_llamafactory_sft_and_unmarked_images(folder: Path) -> None:
    turns = [{"from": "human", "value": "Compare <image> with <image>"}, {"from": "gpt", "value": "same"}]
    example = only(read(folder, {"conversations": turns, "images": ["images/a.png", "images/b.png"]}))
    assert example.prompt[0].parts == ("Compare ", None, " with ", None)
    assert (example.chosen.text, example.rejected) == ("same", ())
    unmarked = [{"from": "human", "value": "Look"}, {"from": "gpt", "value": "ok"}]
    with pytest.raises(DataError, match="marks 0 image places, the row has 1 images"):
        read(folder, {"conversations": unmarked, "images": ["images/a.png"]})


@pytest.mark.parametrize("text", ["<image>Look", "Look"])
@pytest.mark.parametrize(
    "rejected",
    [{"rejected_response": "a cat"}, {"rejected_messages": [turn(USER, "{text}"), turn(BOT, "a cat")]}],
    ids=["response", "messages"],
)
def test_ms_swift(folder: Path, text: str, rejected: dict[str, Any]) -> None:
    rejected = json.loads(json.dumps(rejected).replace("{text}", text))
    row = {"messages": [turn(USER, text), turn(BOT, "a dog")], "images": ["images/a.png"], **rejected}
    result = read(folder, row)
    example = only(result)
    assert result.format == "ms_swift"
    assert example.prompt == (Message("user", (None, "Look")),)
    assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))


def test_rlaifv_parquet_and_rlhfv_text(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    inner = {"question": "What?", "chosen": "a dog", "rejected": "a cat"}
    image = {"bytes": png(), "path": "not/there.jpg"}
    for name, row in {"plain": {"ds_name": "x", "image": image, **inner}, "text": {"image": image}}.items():
        if name == "text":
            row["text"] = json.dumps(inner)
        file = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), file)
        result = read_examples(file)
        example = only(result)
        assert result.format == "rlaifv"
        assert example.prompt == (Message("user", (None, "What?")),)
        assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))
        assert example.images[0].open().size == (5, 4)
        assert example.extra == ({"ds_name": "x"} if name == "plain" else {})


def test_format_choice(folder: Path) -> None:
    both = {"image": "images/a.png", "captions": ["x"], "prompt": "Q", "chosen": "A", "rejected": "B"}
    with pytest.raises(DataError, match=r"match several formats \(trl, captions\); set data.format"):
        read(folder, both)
    assert read(folder, both, format="trl").examples[0].chosen.text == "A"
    assert read(folder, both, format="captions").examples[0].chosen.text == "x"
    with pytest.raises(DataError, match="unknown data format 'caption'; did you mean 'captions'"):
        read(folder, both, format="caption")
    with pytest.raises(DataError, match=r"columns \(hello\) match no known format.*rlaifv"):
        read(folder, {"hello": 1})


def test_every_format_names_columns_that_it_matches_alone() -> None:
    for form in FORMATS.values():
        for need in form.columns:
            assert form.matches(need)
        others = [other.name for other in FORMATS.values() if other.matches(form.columns[0])]
        assert others == [form.name]
