"""Where rows come from: files, folders, shards, datasets' own folders, the hub."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import iter_rows
from cwdpo.errors import DataError

ROWS: list[dict[str, Any]] = [{"n": i} for i in range(1, 4)]
NUMBERED = list(enumerate(ROWS, start=1))


def lines(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for file in (lines(tmp_path / "a.jsonl"), tmp_path / "a.json", table(tmp_path / "a.parquet")):
        assert list(iter_rows(file)) == NUMBERED
        assert list(iter_rows(str(file))) == NUMBERED


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\n{"n": 2}')
    assert list(iter_rows(file)) == [(1, {"n": 1}), (3, {"n": 2})]


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\nbroken\n')
    rows = iter_rows(file)
    assert next(rows) == (1, {"n": 1})
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is not JSON"):
        next(rows)


def test_parquet_row_numbers_go_on_over_batches(tmp_path: Path) -> None:
    many = [{"n": i} for i in range(200)]
    assert [number for number, _ in iter_rows(table(tmp_path / "a.parquet", many))] == list(range(1, 201))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"n": 1}\n{"n": 2}', "must be called .jsonl"),
        ("a.json", '{"n": 1}', "holds dict; allowed: a list"),
        ("a.json", "[", "not JSON"),
        ("a.parquet", "PAR1 not really", "not readable as parquet"),
        ("a.csv", "n\n1", r"cannot read \.csv; allowed: \.jsonl"),
        ("a", "n\n1", "cannot read a file without suffix"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(iter_rows(tmp_path / name))


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data here"):
        list(iter_rows(tmp_path))
    lines(tmp_path / "other.jsonl")
    assert list(iter_rows(tmp_path)) == NUMBERED
    lines(tmp_path / "validation.jsonl", [{"n": 0}])
    with pytest.raises(
        DataError, match=r"several data files \(other.jsonl, validation.jsonl\); name the one"
    ):
        list(iter_rows(tmp_path))
    lines(tmp_path / "captions.jsonl", [{"n": 8}])
    assert list(iter_rows(tmp_path)) == [(1, {"n": 8})]
    lines(tmp_path / "train.jsonl", [{"n": 9}])
    with pytest.raises(DataError, match=r"several data files \(captions.jsonl, train.jsonl\)"):
        list(iter_rows(tmp_path))
    (tmp_path / "captions.jsonl").unlink()
    assert list(iter_rows(tmp_path)) == [(1, {"n": 9})]


def test_parquet_shards(tmp_path: Path) -> None:
    for i in range(3):
        table(tmp_path / "data" / f"train-{i:05d}-of-00003.parquet", [{"n": 10 * i}, {"n": 10 * i + 1}])
    table(tmp_path / "data" / "test-00000-of-00001.parquet", [{"n": -1}])
    assert [row["n"] for _, row in iter_rows(tmp_path)] == [0, 1, 10, 11, 20, 21]
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards of 'train' are missing \(the first: 00001\)"):
        list(iter_rows(tmp_path))


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), colour).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def pictures() -> datasets.Dataset:
    picture = {"bytes": jpeg("red"), "path": None}
    columns = {"images": [[picture]], "prompt": ["Q"], "chosen": ["A"], "rejected": ["B"]}
    return datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))


def test_saved_datasets(tmp_path: Path, pictures: datasets.Dataset) -> None:
    pictures.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": pictures, "test": pictures}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        (example,) = read_examples(tmp_path / name).examples
        assert example.images[0].encoded() == jpeg("red")  # not compressed a second time
        assert example.prompt[0].parts == (None, "Q")
    datasets.DatasetDict({"dev": pictures, "test": pictures}).save_to_disk(tmp_path / "three")
    with pytest.raises(DataError, match="no split 'train' but dev, test"):
        read_examples(tmp_path / "three")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captioned = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpeg("blue"), "path": "p/dog.jpg"}], "captions": [["x"]]}
    )
    captioned = captioned.cast_column("image", datasets.Image())
    asked = []

    def load(name: str, *_: object, **__: object) -> datasets.DatasetDict:
        asked.append(name)
        if name != "someone/dogs":
            raise FileNotFoundError("no such data set in the cache")
        return datasets.DatasetDict({"train": captioned})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (example,) = read_examples("someone/dogs").examples
    assert (example.id, example.where) == ("dog#0", "someone/dogs[train]:1")
    assert example.images[0].encoded() == jpeg("blue")
    with pytest.raises(
        DataError, match=r"^someone/cats: datasets cannot load it \(.*Error: .*HF_HUB_OFFLINE=1"
    ):
        read_examples("someone/cats")
    for path in ("someone/dogs.jsonl", "just-a-name", "../someone/dogs", "a/b/c", "nul\0/x"):
        with pytest.raises(DataError, match=r"no file or folder|cannot be a path"):
            read_examples(path)
    (tmp_path / "someone" / "dogs").mkdir(parents=True)
    lines(tmp_path / "someone" / "dogs" / "train.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    assert read_examples("someone/dogs").format == "trl"  # a local path goes first
    assert asked == ["someone/dogs", "someone/cats"]
