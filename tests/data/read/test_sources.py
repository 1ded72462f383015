"""Compressed files, WebDataset's shards and InternVL's registry."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.data.read.reader import read_examples
from cwdpo.data.read.rows import count_rows, iter_rows, open_source
from cwdpo.data.validate.checks import validate
from cwdpo.errors import DataError

ROWS = [{"prompt": f"Q{i}", "chosen": "A", "rejected": "B"} for i in range(3)]


def jsonl(rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# --- gzip -----------------------------------------------------------------------------------------------


def test_packed_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + jsonl(ROWS)))
    (tmp_path / "list.JSON.GZ").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    for name in ("train.jsonl.gz", "list.JSON.GZ", "."):
        assert [row for _, row in iter_rows(tmp_path / name)] == ROWS
    result = read_examples(tmp_path)
    assert [e.id for e in result.examples] == ["train.jsonl#1", "train.jsonl#2", "train.jsonl#3"]
    assert count_rows(open_source(tmp_path / "train.jsonl.gz")) is None
    report = validate(tmp_path / "train.jsonl.gz", fix=tmp_path / "good.jsonl")
    assert (report.good, report.problems) == (3, [])
    assert (tmp_path / "good.jsonl").read_bytes() == jsonl(ROWS)


def test_a_packed_training_file_has_its_held_out_set_beside_it(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "image": "a.png"}]
    (tmp_path / "a.png").write_bytes(png("red"))
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl(rows)))
    report = validate(tmp_path)
    assert report.path == str(tmp_path / "train.jsonl.gz")
    assert report.against == {str(tmp_path / "val.jsonl.gz"): 1}
    assert [g.kind for g in report.problems] == ["leak"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(jsonl(ROWS * 200))[:-12], "Compressed file ended before"),
        (b"no gzip", "Not a gzipped file"),
        (gzip.compress(jsonl(ROWS * 50))[:20] + b"\x00" * 30, "cannot be read"),
    ],
    ids=["cut", "plain", "damaged"],
)
def test_damaged_gzip_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(iter_rows(tmp_path / "train.jsonl.gz"))
    (tmp_path / "train.json.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(iter_rows(tmp_path / "train.json.gz"))


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.zst", "a.parquet.gz", "a.gz"])
def test_other_packings_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot read .*allowed: .*\.jsonl\.gz"):
        list(iter_rows(tmp_path / name))


# --- WebDataset -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz")])
def test_a_shard(tmp_path: Path, name: str, mode: str) -> None:
    members = {
        "d/000.json": json.dumps({**ROWS[0], "source": "web"}).encode(),
        "d/000.PNG": png("red"),
        "d/001.b.png": png("blue"),
        "d/001.a.png": png("green"),
        "d/001.json": json.dumps({**ROWS[1], "id": "own"}).encode(),
        "d/002.json": json.dumps(ROWS[2]).encode(),
        "d/002.cls": b"7",
        "d/._002.png": b"of a Mac",
    }
    result = read_examples(tar(tmp_path / name, members, mode))
    assert result.problems == []
    assert [e.id for e in result.examples] == ["d/000", "own", "d/002"]
    shown = [[i.open().getpixel((0, 0)) for i in e.images] for e in result.examples]
    assert shown == [[(255, 0, 0)], [(0, 128, 0), (0, 0, 255)], []]
    assert result.examples[0].extra == {"source": "web"}
    assert result.examples[2].extra == {"cls": "7"}
    assert any("cls (1 rows), source (1 rows)" in note for note in result.notes)
    report = validate(tmp_path / name, fix=tmp_path / "good.jsonl")
    assert (report.good, report.images.n) == (3, 3)
    assert [len(e.images) for e in read_examples(tmp_path / "good.jsonl").examples] == [1, 2, 0]


def test_captions_of_a_shard_and_pictures_that_the_json_names(tmp_path: Path) -> None:
    result = read_examples(tar(tmp_path / "c.tar", {"0.jpg": png("red"), "0.txt": b"a cat\n"}))
    assert (result.format, result.examples[0].chosen.text) == ("captions", "a cat")
    named = {**ROWS[0], "images": ["x/0.b.png", "0.a.png"]}
    members = {"0.a.png": png("red"), "0.b.png": png("blue"), "0.json": json.dumps(named).encode()}
    (example,) = read_examples(tar(tmp_path / "n.tar", members)).examples
    assert [i.open().getpixel((0, 0)) for i in example.images] == [(0, 0, 255), (255, 0, 0)]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"0.json": b"{"}, "[json]: not JSON"),
        ({"0.json": b"[1]"}, "[json]: list in .json"),
        (
            {"0.json": json.dumps({**ROWS[0], "image": "z.png"}).encode(), "0.png": png("red")},
            "its images are 0.png",
        ),
        (
            {"0.json": json.dumps({**ROWS[0], "video": "z.mp4"}).encode(), "0.mp4": b"video"},
            "its videos are 0.mp4",
        ),
        ({"0.json": json.dumps(ROWS[0]).encode(), "0.wav": b"sound"}, "[audios]: ['5 bytes of wav']: sound"),
        ({"0.txt": b"\xff\xfe", "0.png": png("red")}, "[txt]: not UTF-8"),
        ({"0.json": json.dumps(ROWS[0]).encode(), "0.png": b"no picture"}, "is not an image"),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, members: dict[str, bytes], problem: str) -> None:
    good = {f"good{i}.json": json.dumps(row).encode() for i, row in enumerate(ROWS)}
    file = tar(tmp_path / "s.tar", {**good, **members})
    result = read_examples(file, max_bad_fraction=0.5, format="trl")
    assert len(result.examples) == 3
    (found,) = result.problems
    assert (found.file, found.row) == (str(file), 4)
    assert problem in str(found)


def test_links_and_large_members_of_a_shard_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        data = json.dumps(ROWS[0]).encode()
        info = tarfile.TarInfo("0.json")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    assert read_examples(path).examples[0].images == ()
    monkeypatch.setattr("cwdpo.data.read.tar._LARGEST", 10)
    with pytest.raises(DataError, match=r"'0.json' has \d+ bytes; allowed: 10"):
        read_examples(path)


@pytest.mark.parametrize("cut", [0, 700, 1024, 1500])
def test_a_damaged_shard_is_named(tmp_path: Path, cut: int) -> None:
    path = tar(tmp_path / "s.tar", {"0.json": json.dumps(ROWS[0]).encode(), "0.png": png("red") * 20})
    path.write_bytes(path.read_bytes()[:cut] if cut else b"no tar at all")
    with pytest.raises(DataError, match=r"s\.tar: not readable as tar after row \d+ .*fetch it again"):
        list(iter_rows(path))
    packed = tar(
        tmp_path / "s.tgz", {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(ROWS)}, "w:gz"
    )
    packed.write_bytes(packed.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"s\.tgz: not readable as tar"):
        list(iter_rows(packed))


def test_shards_of_a_folder(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        tar(tmp_path / f"train-{i:06d}.tar", {f"{i}.json": json.dumps(row).encode()})
    assert [row["prompt"] for _, row in iter_rows(tmp_path)] == ["Q0", "Q1", "Q2"]
    assert [row["prompt"] for _, row in iter_rows(tmp_path / "train-00000[12].tar".replace("[12]", "*"))] == [
        "Q0", "Q1", "Q2",
    ]  # fmt: skip
    tar(tmp_path / "other-000000.tar", {"0.json": b"{}"})
    with pytest.raises(DataError, match="several data files"):
        list(iter_rows(tmp_path / "*.tar"))
    assert len(list(iter_rows(tmp_path))) == 3, "train goes first"
    (tmp_path / "other-000000.tar").unlink()
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards of 'train' are missing \(the first: 00001\)"):
        list(iter_rows(tmp_path))
    with pytest.raises(DataError, match="no file or folder"):
        list(iter_rows(tmp_path / "none-*.tar"))


# --- InternVL's registry --------------------------------------------------------------------------------


@pytest.fixture
def mmpr(tmp_path: Path) -> Path:
    """A release of MMPR: a registry, annotations, and pictures below the roots; paths from the folder above."""
    base = tmp_path / "MMPR"
    (base / "annotations").mkdir(parents=True)
    for name, colour in (("one", "red"), ("two", "blue")):
        (base / "images" / name).mkdir(parents=True)
        (base / "images" / name / "a.png").write_bytes(png(colour))
    single = {"id": 0, "image": "a.png", "question": "<image>\nQ", "chosen": "A", "rejected": "B"}
    several = {
        "id": 0,
        "image": ["a.png", "a.png"],
        "question": "<image> <image>\nQ",
        "chosen": "A",
        "rejected": "B",
    }
    texts = [{"id": i, "question": f"T{i}", "chosen": "A", "rejected": "B"} for i in range(400)]
    for name, rows in (("one", [single]), ("two", [several]), ("texts", texts)):
        (base / "annotations" / f"{name}.jsonl").write_bytes(jsonl(rows))
    return base


def registry(base: Path, prefix: str = "MMPR/", **changes: Any) -> Path:
    entries = {
        name: {
            "root": f"{prefix}images/{name}",
            "annotation": f"{prefix}annotations/{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": 1,
        }
        for name in ("one", "two", "texts")
    }
    entries["texts"]["root"] = ""
    for key, value in changes.items():
        name, _, field = key.partition("__")
        entries[name][field] = value
    (base / "meta.json").write_text(json.dumps(entries))
    return base / "meta.json"


@pytest.mark.parametrize("prefix", ["MMPR/", ""])
def test_all_sets_of_a_registry(mmpr: Path, prefix: str) -> None:
    result = read_examples(registry(mmpr, prefix))
    assert (result.format, result.problems, result.rows) == ("rlaifv", [], 402)
    one, two = result.examples[:2]
    assert (one.id, two.id, result.examples[2].id) == ("one#1", "two#1", "texts#1")
    assert [[i.open().getpixel((0, 0)) for i in e.images] for e in (one, two)] == [
        [(255, 0, 0)],
        [(0, 0, 255)] * 2,
    ]
    assert one.where == f"{mmpr / 'annotations' / 'one.jsonl'}:1"
    assert [e.id for e in read_examples(f"{mmpr}/meta.json:two").examples] == ["two#1"]


def test_repeat_time(mmpr: Path) -> None:
    ids = [e.id for e in read_examples(f"{registry(mmpr, one__repeat_time=3)}:one").examples]
    assert ids == ["one#1", "one#1@2", "one#1@3"]
    report = validate(f"{mmpr}/meta.json:one")
    assert (report.good, report.problems) == (3, []), "asked for, so no duplicates"
    half = [e.id for e in read_examples(f"{registry(mmpr, texts__repeat_time=0.5)}:texts").examples]
    assert half == [e.id for e in read_examples(f"{mmpr}/meta.json:texts").examples], (
        "the same rows each time"
    )
    # 400 rows at 0.5: 200 with a standard deviation of 10.
    assert 150 < len(half) < 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"one__repeat_time": 0}, "one: repeat_time = 0; allowed: a whole number from 1 to 1000, or a share"),
        ({"one__repeat_time": 1.5}, "repeat_time = 1.5"),
        ({"one__repeat_time": 1001}, "repeat_time = 1001"),
        ({"one__repeat_time": 10**308}, "repeat_time = 1000"),
        ({"one__repeat_time": 10**310}, "repeat_time = 1000"),
        ({"one__repeat_time": float("nan")}, "repeat_time = nan"),
        ({"one__repeat_time": "2"}, "repeat_time = '2'"),
        ({"one__repeat_time": True}, "repeat_time = True"),
        ({"one__data_augment": True}, "data_augment = true: pictures are not altered"),
        ({"one__max_dynamic_patch": 6}, "max_dynamic_patch = 6: tiles are the processor's"),
        ({"one__rot": "x"}, r"unknown key 'rot'; did you mean 'root'\?"),
        ({"two__annotation": "MMPR/annotations/gone.jsonl"}, "two: annotation = .*: there is no"),
        ({"one__annotation": "gone.jsonl"}, "annotation = 'gone.jsonl': there is no such file in"),
        ({"two__root": "../../elsewhere"}, "two: root = '../../elsewhere': leads outside"),
        ({"two__root": "\ud800"}, r"two: root = .*ud800.*: leads outside"),
        ({"two__root": "a\0b"}, r"two: root = 'a.*b': leads outside"),
        ({"two__annotation": "/etc/hostname"}, "two: annotation = '/etc/hostname': leads outside"),
        ({"two__root": 3}, "two: root = 3"),
    ],
)
def test_a_registry_that_cannot_be_honoured_is_refused(
    mmpr: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(registry(mmpr, **changes))


def test_names_of_a_registry(mmpr: Path) -> None:
    with pytest.raises(DataError, match=r"no data set 'ones'; did you mean 'one'\?; known: one, two, texts"):
        read_examples(f"{registry(mmpr)}:ones")
    (mmpr / "plain.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="holds dict; allowed: a list of objects"):
        read_examples(mmpr / "plain.json")
    with pytest.raises(DataError, match="no file or folder"):
        read_examples(f"{mmpr}/plain.json:one")
    (mmpr / "images" / "one" / "a.png").unlink()
    with pytest.raises(DataError, match=r"one\.jsonl:1 \[image\]: there is no file 'MMPR/images/one/a.png'"):
        read_examples(f"{mmpr}/meta.json:one")


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.jsonl.gz", "s.tar", "s.tgz", "meta.json"])
def test_no_damaged_file_raises_anything_but_data_error(tmp_path: Path, mmpr: Path, name: str) -> None:
    """A hundred seeded mutations each: bytes changed, cut out, put in."""
    rows = [{**row, "image": "a.png"} for row in ROWS]
    (tmp_path / "a.png").write_bytes(png("red"))
    members = {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(ROWS)} | {"1.png": png("red")}
    if name == "meta.json":
        path = registry(mmpr)
    elif name.startswith("s."):
        path = tar(tmp_path / name, members, "w:gz" if name == "s.tgz" else "w")
    else:
        path = tmp_path / name
        path.write_bytes(gzip.compress(jsonl(rows)))
    whole = path.read_bytes()
    draw = random.Random(7)
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at, size = draw.randrange(len(data)), draw.randint(1, 40)
            data[at : at + draw.choice((0, size))] = draw.randbytes(draw.choice((0, 1, size)))
        path.write_bytes(bytes(data))
        try:
            read_examples(path, max_bad_fraction=1.0)
        except DataError:
            refused += 1
    assert refused > 20
