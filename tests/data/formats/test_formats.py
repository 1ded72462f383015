"""Each format, read from a hand-made file, gives the Examples that its rows mean."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.data.formats.base import FORMATS, find_format
from cwdpo.data.read.reader import ReadResult, read_examples
from cwdpo.errors import DataError, UnknownComponentError
from cwdpo.records import Completion, Example, Message
from paths import ROOT

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


IMAGE = {"images": ["images/a.png"]}
TURN = [{"role": USER, "content": "<image>What?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "<image>What?", "chosen": "a dog", "rejected": "a cat"},
        {"instruction": "<image>", "input": "What?", "chosen": "a dog", "rejected": "a cat"},
        {"messages": TURN, "chosen": turn(BOT, "a dog"), "rejected": turn(BOT, "a cat")},
        {"messages": TURN, "chosen": "a dog", "rejected": "a cat"},
    ],
    ids=["alpaca", "alpaca with input", "openai", "openai with strings"],
)
def test_llamafactory_s_other_spellings(folder: Path, row: dict[str, Any]) -> None:
    result = read(folder, {**row, **IMAGE})
    example = only(result)
    assert result.format == "llamafactory"
    assert example.prompt == (Message("user", (None, "What?")),)
    assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))
    assert example.extra == {}


def test_alpaca_history_system_and_output(folder: Path) -> None:
    row = {"instruction": "And here?", "input": "", "output": "red", "system": "Be brief.",
           "history": [["<image>What?", "a dog"]], **IMAGE}  # fmt: skip
    example = only(read(folder, row))
    assert example.prompt == (
        Message("system", ("Be brief.",)),
        Message("user", (None, "What?")),
        Message("assistant", ("a dog",)),
        Message("user", ("And here?",)),
    )
    assert (example.chosen.text, example.rejected) == ("red", ())
    with pytest.raises(
        DataError, match=r"history\[0\]\]: str .'What\?'.; allowed: \[question, answer\], two strings"
    ):
        read(folder, {**row, "history": ["What?"]})
    with pytest.raises(DataError, match=r"\[history\]: str"):
        read(folder, {**row, "history": "What?"})
    with pytest.raises(DataError, match=r"\[input\]: int \(3\); allowed: a string"):
        read(folder, {**row, "input": 3})


def test_llamafactory_s_halves_and_doubles(folder: Path) -> None:
    said = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "a dog"}]
    example = only(read(folder, {"conversations": said, "rejected": "a cat", **IMAGE}))
    assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))
    system = [{"from": "system", "value": "Be brief."}, *said]
    example = only(read(folder, {"conversations": system, "system": "Be long.", **IMAGE}))
    assert [m.role for m in example.prompt] == ["system", "user"]
    assert example.prompt[0].parts == ("Be brief.",), "as LLaMA-Factory has it"
    with pytest.raises(DataError, match="both 'conversations' and 'messages' are set"):
        read(folder, {"conversations": said, "messages": TURN, "chosen": "a", "rejected": "b", **IMAGE})
    for row in ({"messages": TURN, "chosen": "a dog"}, {"instruction": "<image>What?", "chosen": "a dog"}):
        with pytest.raises(DataError, match=r"llamafactory.*\n.*\n.*'rejected' is missing"):
            read(folder, {**row, **IMAGE})
    plain = {"prompt": "What?", "chosen": "a dog", "rejected": "a cat", "instruction": "annotate", **IMAGE}
    assert read(folder, plain).format == "trl"
    with pytest.raises(DataError, match=r"it would be .*trl with 'rejected', trl with 'prompt'"):
        read(folder, {"chosen": "a", "image": "images/a.png"})
    video = [{"from": "human", "value": "<image><video>What?"}, said[1]]
    with pytest.raises(DataError, match="marks 1 video places, the row has 0 videos"):
        read(folder, {"conversations": video, **IMAGE})


@pytest.mark.parametrize("key", ["rejected_conversations", "contrastive_conversations"])
def test_povid_and_vdpo(folder: Path, key: str) -> None:
    asked = {"from": "human", "value": "<image>\nWhat?"}
    row = {"id": "p1", "image": "images/a.png", "conversations": [asked, {"from": "gpt", "value": "a dog"}],
           key: [asked, {"from": "gpt", "value": "a cat"}]}  # fmt: skip
    result = read(folder, row)
    example = only(result)
    assert (result.format, example.id) == ("povid", "p1")
    assert example.prompt == (Message("user", (None, "What?")),)
    assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))
    with pytest.raises(DataError, match="do not begin with the prompt"):
        read(folder, {**row, key: [{"from": "human", "value": "Other?"}, {"from": "gpt", "value": "a cat"}]})


def test_mdpo_is_trl_s_with_another_name_for_the_picture(folder: Path) -> None:
    row = {"img_path": "images/a.png", "prompt": "What?", "chosen": "a dog", "rejected": "a cat"}
    result = read(folder, row)
    assert result.format == "trl"
    assert only(result).prompt == (Message("user", (None, "What?")),)
    assert only(result).images[0].path == (folder / "images" / "a.png").resolve()
    with pytest.raises(DataError, match="both 'img_path' and 'image' are set"):
        read(folder, {**row, "image": "images/a.png"})


def rated(model: str, response: str, *ratings: str) -> dict[str, Any]:
    aspects = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    return {
        "annotations": {a: {"Rating": r, "Rationale": "x"} for a, r in zip(aspects, ratings, strict=True)},
        "model": model,
        "response": response,
    }


def test_vlfeedback_takes_the_best_rated_and_all_that_are_worse(folder: Path) -> None:
    rows = [
        rated("m1", "fair", "3", "4", "5"),  # mean 4
        rated("m2", "best", "5", "4", "N/A"),  # mean 4.5
        rated("m3", "as good", "4", "5", "4.5"),  # 4.5 too: no negative
        rated("m4", "poor", "1", "1", "1"),
        rated("m5", "unrated", "N/A", "", "no"),
    ]
    made = {"img_path": "images/a.png", "prompt": "What?", "models": ["m1"], "completions": rows}
    result = read(folder, made)
    example = only(result)
    assert result.format == "vlfeedback"
    assert example.chosen.text == "best"
    assert [(n.text, n.made) for n in example.rejected] == [
        ("fair", {"model": "m1", "rating": 4.0}),
        ("poor", {"model": "m4", "rating": 1.0}),
    ]
    columns = {
        key: [row[key] for row in rows] for key in rows[0]
    }  # as datasets' Sequence of a struct stores it
    assert only(read(folder, {**made, "completions": columns})).rejected == example.rejected
    with pytest.raises(DataError, match="all have the same rating"):
        read(folder, {**made, "completions": rows[1:3]})
    with pytest.raises(DataError, match="1 with a rating; allowed: two or more"):
        read(folder, {**made, "completions": [rows[0], rated("m6", "no number", "nan", "inf", "")]})
    with pytest.raises(DataError, match="columns of these of equal length"):
        read(folder, {**made, "completions": {**columns, "model": ["m1"]}})


def test_an_entry_of_llamafactory_s_registry(folder: Path) -> None:
    (folder / "sub").mkdir()
    row = {"dialog": [{"who": "u", "what": "<image>What?"}], "good": {"who": "a", "what": "a dog"},
           "bad": {"who": "a", "what": "a cat"}, "pics": ["images/a.png"], "note": 1}  # fmt: skip
    (folder / "sub" / "pairs.json").write_text(json.dumps([row]))
    alpaca = {"q": "<image>What?", "better": "a dog", "worse": "a cat", "pics": ["images/a.png"]}
    (folder / "alpaca.jsonl").write_text(json.dumps(alpaca) + "\n")
    registry = {
        "pairs": {
            "file_name": "sub/pairs.json", "formatting": "sharegpt", "ranking": True,
            "columns": {"messages": "dialog", "chosen": "good", "rejected": "bad", "images": "pics"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "u", "assistant_tag": "a"},
        },
        "alpaca": {
            "file_name": "alpaca.jsonl", "ranking": True,
            "columns": {"prompt": "q", "chosen": "better", "rejected": "worse", "images": "pics"},
        },
        "sound": {"file_name": "x.json", "columns": {"audios": "v"}},
        "script": {"script_url": "x"},
        "empty": {},
    }  # fmt: skip
    file = folder / "dataset_info.json"
    file.write_text(json.dumps(registry))
    for name in ("pairs", "alpaca"):
        result = read_examples(f"{file}:{name}")
        example = only(result)
        assert result.format == "llamafactory"
        assert example.prompt == (Message("user", (None, "What?")),)
        assert (example.chosen.text, example.rejected) == ("a dog", (Completion("a cat"),))
        assert example.images[0].path == (folder / "images" / "a.png").resolve(), "from the registry's folder"
    assert only(read_examples(f"{file}:pairs")).extra == {"note": 1}
    for name, said in {
        "pair": "no data set 'pair'; did you mean 'pairs'?; known: pairs, alpaca",
        "sound": "sound: columns.audios: sound is not read",
        "script": "loading scripts are not run",
        "empty": "neither 'file_name' nor 'hf_hub_url'",
    }.items():
        with pytest.raises(DataError, match=said.replace("?;", r"\?;")):
            read_examples(f"{file}:{name}")
    with pytest.raises(DataError, match=r"cannot be read .*FOLDER/dataset_info.json:NAME"):
        read_examples(folder / "nowhere" / "dataset_info.json:pairs")


def test_a_registry_decides_what_is_read(folder: Path) -> None:
    row = {"q": "<image>What?", "better": "a dog", "worse": "a cat", "pic": "images/a.png", "note": 1,
           "input": "FOR ANNOTATORS", "system": "x", "history": [], "prompt": "y"}  # fmt: skip
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse", "images": "pic"}
    base = {"file_name": "rows.jsonl", "ranking": True, "columns": columns}
    file = folder / "dataset_info.json"

    def entry(**changes: Any) -> str:
        file.write_text(json.dumps({"a": {**base, **changes}}))
        return f"{file}:a"

    example = only(read_examples(entry()))
    assert example.prompt == (Message("user", (None, "What?")),), "what is not listed is not read"
    assert example.extra == {"note": 1, "prompt": "y"}
    assert only(read_examples(entry(hf_hub_url=None, ms_hub_url=None))).chosen.text == "a dog"
    for changes, said in (
        ({"ms_hub_url": "x/y"}, "ModelScope is not read"),
        ({"revision": "v1"}, "revision = 'v1': it belongs to 'hf_hub_url'"),
        ({"num_samples": 2}, "remove it here and set data.limit"),
        ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'?"),
        ({"columns": {**columns, "mesages": "q"}}, "unknown key columns.mesages; did you mean 'messages'?"),
        (
            {"columns": {**columns, "query": "q"}},
            "columns.query = 'q'; allowed: a name that no other key has",
        ),
        ({"columns": {**columns, "kto_tag": "k"}}, "KTO's labels are not read"),
        ({"formatting": "sharedgpt"}, "formatting = 'sharedgpt'; allowed: alpaca, sharegpt"),
        ({"file_name": ""}, "file_name = ''; allowed: a name"),
        ({"file_name": "gone.json"}, "file_name = 'gone.json': there is no"),
        ({"columns": {**columns, "chosen": "best"}}, "columns.chosen of"),
    ):
        with pytest.raises(DataError, match=re.escape(said)):
            read_examples(entry(**changes))
    wrong = {
        "[]": "holds list; allowed: an object",
        '{"a": 1}': "a: int; allowed: an object",
        "{": "not JSON",
    }
    for text, said in wrong.items():
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            read_examples(f"{file}:a")


def test_a_registry_s_own_tags_are_named_in_errors(folder: Path) -> None:
    tags = {
        "role_tag": "who",
        "content_tag": "what",
        "user_tag": "U",
        "assistant_tag": "A",
        "system_tag": "S",
    }
    columns = {"messages": "dialog", "images": "pics"}
    info = {"a": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for turn_, said in (
        ({"who": "USR", "what": "x"}, "[dialog[0].who]: 'USR'; allowed: U, A, S"),
        (
            {"role": "U", "what": "x"},
            "[dialog[0].who]: no key 'who', which tags.role_tag names; this",
        ),
    ):
        (folder / "rows.jsonl").write_text(json.dumps({"dialog": [turn_], "pics": []}) + "\n")
        with pytest.raises(DataError, match=re.escape(said)):
            read_examples(folder / "dataset_info.json:a")


def test_format_choice(folder: Path) -> None:
    both = {"image": "images/a.png", "captions": ["x"], "prompt": "Q", "chosen": "A", "rejected": "B"}
    with pytest.raises(DataError, match=r"match several formats \(captions, trl\); set data.format"):
        read(folder, both)
    assert read(folder, both, format="trl").examples[0].chosen.text == "A"
    assert read(folder, both, format="captions").examples[0].chosen.text == "x"
    with pytest.raises(UnknownComponentError, match="unknown data format 'caption'; did you mean 'captions'"):
        read(folder, both, format="caption")
    with pytest.raises(DataError, match=r"columns \(hello\) match no known format.*rlaifv"):
        read(folder, {"hello": 1})


def test_the_rows_of_the_docs_are_read(folder: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    picture(folder / "a.png")
    found: set[str] = set()
    for part in text.split("<!-- rows -->")[1].split("<!-- end rows -->")[0].split("\n**`")[1:]:
        name = part.split("`")[0]
        rows = [json.loads(line) for line in part.split("```json\n")[1].split("\n```")[0].splitlines()]
        for group in [rows] if name == "kto" else [[row] for row in rows]:
            assert find_format("auto", frozenset(group[0]), "docs").name == name
            example = only(read(folder, *group))
            assert None in example.prompt[0].parts
            assert example.chosen.text.startswith("a cat")
            assert [n.text for n in example.rejected] == ([] if name == "captions" else ["a dog"])
        found.add(name)
    assert found <= set(FORMATS.names())
    assert found >= {"trl", "captions", "kto", "llamafactory", "ms_swift", "rlaifv", "povid", "vlfeedback"}
