"""Windows of a streamed source: every row once a turn, the same from any place, and other rows refused."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cwdpo.data.read.hub import hub_rows
from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import open_source
from cwdpo.data.read.stream import Place, RowStream, Window
from cwdpo.data.split import content_keys, part_of
from cwdpo.errors import DataError
from cwdpo.hub import HubData
from cwdpo.records import Completion, Example, ImageRef, Message
from fake_hub import Hub

N = 53


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs(n: int = N) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", pairs())


def prompts(window: Window) -> list[str]:
    return [e.prompt_text for e in window.examples]


def test_windows_go_through_the_source_again_and_again(file: Path) -> None:
    stream, place, found = RowStream(open_source(file)), Place(), list[str]()
    windows = []
    for _ in range(12):  # three turns and a bit
        windows.append(stream.window(place, 14))
        place = windows[-1].end
        found += prompts(windows[-1])
    assert found == [f"q{i % N}" for i in range(12 * 14)]
    assert [w.ended for w in windows[:5]] == [False, False, False, True, False]
    assert windows[3].end == Place(1, 4 * 14 - N, 0)
    for window in (windows[2], windows[3], windows[5], windows[9]):  # as a resumed run reads it
        again = RowStream(open_source(file)).window(window.begin, 14)
        assert prompts(again) == prompts(window)
        assert (again.end, again.digest, again.rows) == (window.end, window.digest, window.rows)


def test_a_window_may_end_inside_a_row(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "captions": [f"{i}{k}" for k in "abc"], "id": str(i)} for i in range(4)]
    source = open_source(write(tmp_path / "captions.jsonl", rows))
    stream, place = RowStream(source, captions_per_image=3), Place()
    said: list[str] = []
    for _ in range(6):
        window = stream.window(place, 4)
        resumed = RowStream(source, captions_per_image=3).window(place, 4)
        assert [e.chosen.text for e in resumed.examples] == [e.chosen.text for e in window.examples]
        assert resumed.end == window.end
        said += [e.chosen.text for e in window.examples]
        place = window.end
    every = [e.chosen.text for e in read_examples(tmp_path / "captions.jsonl", captions_per_image=3).examples]
    assert len(every) == 12
    assert said == every * 2
    assert place == Place(1, 4, 0)


def test_only_wanted_examples_are_in_it_and_once_ends_it(file: Path) -> None:
    stream = RowStream(open_source(file), lambda e: int(e.prompt_text[1:]) % 2 == 0)
    first = stream.window(Place(), 20, once=True)
    assert prompts(first) == [f"q{2 * i}" for i in range(20)]
    assert (first.rows, first.ended) == (39, False)
    rest = stream.window(first.end, 20, once=True)
    assert prompts(rest) == [f"q{i}" for i in range(40, N, 2)]
    assert rest.ended
    with pytest.raises(DataError, match=f"none of {N} rows is one to train on"):
        RowStream(open_source(file), lambda e: False).window(Place(), 5)


def test_bad_rows_are_left_out_and_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*pairs(4), {"prompt": "x", "chosen": "", "rejected": "y"}, *pairs(9)[5:]]
    window = RowStream(open_source(write(tmp_path / "bad.jsonl", rows))).window(Place(), 8)
    assert (window.rows, window.bad_rows, len(window.examples)) == (9, 1, 8)
    assert [str(p).partition(": ")[0].rpartition("/")[2] for p in window.problems] == ["bad.jsonl:5 [chosen]"]


def test_the_format_is_that_of_the_first_rows(tmp_path: Path) -> None:
    """Later rows alone would be taken for another format."""
    rows = [*pairs(20), *({**row, "messages": None, "id": f"{i}"} for i, row in enumerate(pairs(20)))]
    source = open_source(write(tmp_path / "data.jsonl", rows))
    assert len(RowStream(source).window(Place(0, 20), 10).examples) == 10


def test_other_rows_before_the_window_are_refused_by_name(file: Path) -> None:
    stream, place = RowStream(open_source(file)), Place()
    known = {}
    for _ in range(4):
        window = stream.window(place, 10)
        known[window.begin.row] = window.digest
        place = window.end
    known[place.row] = stream.window(place, 5).digest
    assert len(set(known.values())) == 5
    whole = file.read_text()
    assert prompts(RowStream(open_source(file)).window(place, 3, known=known)) == ["q40", "q41", "q42"]
    file.write_text(whole.replace("good 23", "good  23"))
    with pytest.raises(DataError, match=r"data.jsonl: rows 21 to 30 are not those that this run has read"):
        RowStream(open_source(file)).window(place, 3, known=known)
    assert len(RowStream(open_source(file)).window(place, 3).examples) == 3  # with --accept-changes
    file.write_text(whole.replace("good 47", "good  47"))  # not read yet
    assert len(RowStream(open_source(file)).window(place, 3, known=known).examples) == 3
    file.write_text("".join(whole.splitlines(keepends=True)[:37]))
    with pytest.raises(DataError, match="has 37 rows, but this run has read 40"):
        RowStream(open_source(file)).window(place, 3, known={})


def test_a_row_of_a_table_has_a_digest_with_its_pictures(tmp_path: Path) -> None:
    def digest(colour: int) -> str:
        data = BytesIO()
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(data, "PNG")
        columns = {
            **{k: ["a"] for k in ("prompt", "chosen")},
            "rejected": ["b"],
            "image": [{"bytes": data.getvalue()}],
        }
        pq.write_table(pa.table(columns), tmp_path / "data.parquet")
        stream = RowStream(open_source(tmp_path / "data.parquet"))
        return stream.window(stream.window(Place(), 1).end, 1, once=True).digest

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_what_needs_the_whole_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(pairs(2)))
    with pytest.raises(
        DataError, match=r"list\.json: a \.json list is read as a whole and cannot be streamed"
    ):
        RowStream(open_source(tmp_path / "list.json"))
    kto = write(tmp_path / "kto.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    with pytest.raises(DataError, match="format kto joins rows from anywhere in the set"):
        RowStream(open_source(kto)).window(Place(), 1)


def example(*colours: int) -> Example:
    def png(colour: int) -> bytes:
        data = BytesIO()
        Image.new("RGB", (2, 2), (colour, 0, 0)).save(data, "PNG")
        return data.getvalue()

    images = tuple(ImageRef(data=png(c)) for c in colours)
    return Example("x", images, (Message("user", ("q",)),), Completion("a"))


def test_an_example_is_split_by_its_images_alone() -> None:
    one = [part_of(content_keys(example(c)), 0.75, 3) for c in range(200)]
    assert 0.65 < one.count(True) / 200 < 0.85
    assert None not in one
    for c in range(0, 200, 2):
        both = part_of(content_keys(example(c, c + 1)), 0.75, 3)
        assert both == (one[c] if one[c] == one[c + 1] else None)
    assert one != [part_of(content_keys(example(c)), 0.75, 4) for c in range(200)]
    assert {part_of(content_keys(example(c)), share, 0) for c in range(9) for share in (0.0, 1.0)} == {
        True,
        False,
    }


@pytest.fixture
def shards(hub: Hub) -> Hub:
    import datasets

    data = BytesIO()
    Image.new("RGB", (4, 4), "red").save(data, "PNG")
    features = datasets.Features(
        {**{k: datasets.Value("string") for k in pairs(1)[0]}, "image": datasets.Image()}
    )
    files = {}
    for shard in range(2):
        rows = [
            {**row, "image": {"bytes": data.getvalue(), "path": None}} for row in pairs(40)[20 * shard :][:20]
        ]
        made, sink = datasets.Dataset.from_list(rows, features=features), BytesIO()
        made.to_parquet(sink)
        files[f"data/train-{shard:05d}-of-00002.parquet"] = sink.getvalue()
    hub.add("datasets", "someone/pairs", files)
    return hub


def archive() -> bytes:
    sink = BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for i, row in enumerate(pairs(7)):
            for name, data in ((f"{i}.json", json.dumps(row).encode()), (f"{i}.txt", b"more")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return sink.getvalue()


def test_every_kind_of_files_of_the_hub_is_streamed(hub: Hub) -> None:
    lines = "".join(json.dumps({**row, "n": i or None}) + "\n" for i, row in enumerate(pairs(70)))
    for name, files in {"tar": {"train.tar": archive()}, "lines": {"train.jsonl": lines.encode()}}.items():
        hub.add("datasets", f"someone/{name}", files)
        streamed, fetched = (list(hub_rows(HubData(f"someone/{name}"), streaming=on)) for on in (True, False))
        assert len(streamed) == {"tar": 7, "lines": 70}[name]
        for one, other in zip(streamed, fetched, strict=True):
            assert isinstance(one.value, dict)
            assert isinstance(other.value, dict)
            ours, theirs = ({k: v for k, v in r.items() if k != "__url__"} for r in (one.value, other.value))
            assert ours == theirs


def test_a_set_of_the_hub_is_streamed_as_it_is_fetched(shards: Hub) -> None:
    place = HubData("someone/pairs")
    streamed, fetched = list(hub_rows(place, streaming=True)), list(hub_rows(place))
    assert len(streamed) == 40
    assert [(r.number, r.value) for r in streamed] == [(r.number, r.value) for r in fetched]
    assert isinstance(streamed[0].value, dict)
    assert isinstance(streamed[0].value["image"]["bytes"], bytes)  # not decoded
    window = RowStream(open_source("someone/pairs", streaming=True)).window(Place(0, 15), 10)
    assert prompts(window) == [f"q{i}" for i in range(15, 25)]
    with pytest.raises(DataError, match=r"a part of a split cannot be streamed: leave out \[:10\]"):
        list(hub_rows(HubData("someone/pairs", split="train[:10]"), streaming=True))
