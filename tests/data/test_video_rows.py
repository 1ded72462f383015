"""Rows with videos: where they may be, what is refused, and that every reader of rows knows them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.completions_api import Ask, messages_of
from cwdpo.config import load_recipe
from cwdpo.data.contents import video_digest
from cwdpo.data.read.reader import ReadResult, read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.data.split import split_by_image
from cwdpo.data.validate.checks import validate
from cwdpo.errors import DataError, MissingPackageError, ServerError
from cwdpo.judging.judges.vlm import VlmJudge
from cwdpo.monitor.responses import to_jsonl
from cwdpo.negatives.sources.other_prompt import _usable
from cwdpo.onpolicy.preferences import _write_jsonl, _write_parquet, trl_rows
from cwdpo.onpolicy.record import shown_pairs
from cwdpo.pipeline.inputs import of_rows
from cwdpo.records import VIDEO, Example, Message, VideoRef, VideoSampling
from cwdpo.videos import decoded
from paths import ROOT
from videos import grey, greys, write_video

PAIR = {"chosen": "a cat", "rejected": "a dog"}
SAID = [{"role": "user", "content": "<video>What is it?"}, {"role": "assistant", "content": "a cat"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", grey(20))
    write_video(tmp_path / "b.mp4", grey(10, (64, 48)))
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 6), (40 * i, 0, 0)).save(tmp_path / "frames" / f"{i}.png")
    return tmp_path


def read(folder: Path, *rows: Any, **options: Any) -> ReadResult:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(file, **{"max_bad_fraction": 0.0, **options})


def only(result: ReadResult) -> Example:
    (example,) = result.examples
    return example


QUESTION = (Message("user", (VIDEO, "What is it?")),)


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "prompt": "What is it?", **PAIR},
        {"videos": ["a.mp4"], "prompt": "What is it?", **PAIR},
        {"videos": ["a.mp4"], "prompt": "<video>\nWhat is it?", **PAIR},
        {"videos": [{"path": "a.mp4", "bytes": None}], "prompt": "What is it?", **PAIR},
        {
            "videos": ["a.mp4"],
            "prompt": [
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
            ],
            **PAIR,
        },
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What is it?"}],
                }
            ],
            **PAIR,
        },
        {
            "videos": ["a.mp4"],
            "conversations": [{"from": "human", "value": "<video>What is it?"}],
            "chosen": {"from": "gpt", "value": "a cat"},
            "rejected": {"from": "gpt", "value": "a dog"},
        },
        {"videos": ["a.mp4"], "instruction": "<video>What is it?", "input": "", **PAIR},
        {"videos": ["a.mp4"], "messages": SAID, "rejected_response": "a dog"},
        {
            "videos": ["a.mp4"],
            "messages": [{"role": "user", "content": "What is it?"}, SAID[1]],
            "rejected_response": "a dog",
        },
    ],
)
def test_a_video_is_read_where_it_may_be(folder: Path, row: dict[str, Any]) -> None:
    result = read(folder, row, video=VideoSampling(fps=1, max_frames=7))
    example = only(result)
    assert example.prompt == QUESTION
    assert example.videos == (VideoRef((folder / "a.mp4").resolve(), sampling=VideoSampling(1, 7)),)
    assert (example.images, example.chosen.text, example.rejected[0].text) == ((), "a cat", "a dog")
    assert example.extra == {}
    assert result.notes == ()


def test_the_rows_of_the_docs_are_read(folder: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("\n## Videos\n")[1]
    rows = [json.loads(line) for line in page.split("```json\n")[1].split("```")[0].splitlines()]
    assert len(rows) == 4
    for row in rows:
        example = only(read(folder, row))
        assert len(example.videos) == sum(part is VIDEO for part in example.prompt[0].parts) > 0


def test_images_and_videos_keep_their_places(folder: Path) -> None:
    row = {
        "images": ["a.png"],
        "videos": ["a.mp4", "frames"],
        "prompt": "<video>One, <image>two,\n<video>three?",
    }
    example = only(read(folder, {**row, **PAIR}))
    assert example.prompt[0].parts == (VIDEO, "One, ", None, "two,", VIDEO, "three?")
    assert [v.path for v in example.videos] == [(folder / n).resolve() for n in ("a.mp4", "frames")]
    assert len(example.images) == 1
    unmarked = only(read(folder, {**row, "prompt": "Which?", **PAIR}))
    assert unmarked.prompt[0].parts == (None, VIDEO, VIDEO, "Which?")


def test_a_folder_of_frames_has_the_rate_of_the_recipe(folder: Path) -> None:
    example = only(read(folder, {"video": "frames", "prompt": "Q", **PAIR}, video=VideoSampling(fps=3)))
    clip = decoded(example.videos[0])
    assert (clip.facts.fps, clip.facts.seconds, clip.indices) == (3, 1, (0, 1, 2))


def test_videos_as_bytes(folder: Path) -> None:
    data = (folder / "a.mp4").read_bytes()
    for value in (data, {"bytes": data, "path": "x.mp4"}):
        (example,) = read_examples(rows_source([{"video": value, "prompt": "Q", **PAIR}], "rows")).examples
        assert greys(decoded(example.videos[0]).frames) == [0, 5, 10, 15]


def test_videos_of_a_shard(folder: Path, tmp_path: Path) -> None:
    """One, several by name, those that the JSON names, and a damaged one."""
    a, b = ((folder / f"{name}.mp4").read_bytes() for name in "ab")
    row = {"prompt": "What is it?", **PAIR}
    members = {
        "0.json": row, "0.mp4": a, "1.json": row, "1.1.mp4": b, "1.0.mp4": a,
        "2.json": {**row, "videos": ["2.y.mp4", "2.x.mp4"]}, "2.x.mp4": a, "2.y.mp4": b, "3.json": row, "3.mp4": b"no",
    }  # fmt: skip
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    result = read_examples(tmp_path / "s.tar", format="trl", max_bad_fraction=0.5)
    assert [[v.data for v in e.videos] for e in result.examples] == [[a], [a, b], [b, a]]
    (problem,) = result.problems
    assert (problem.row, problem.key, problem.kind) == (4, "video", "video-unreadable")


@pytest.mark.parametrize(
    ("row", "key", "kind", "said"),
    [
        ({"videos": ["a.mp4"], "prompt": "<video><video>Q"}, "prompt", "video-count", "marks 2 places"),
        ({"videos": ["a.mp4", "b.mp4"], "prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "prompt",
         "video-count", "marks 1 video places, the row has 2 videos"),
        ({"prompt": "<video>Q"}, "prompt[0].content", "placeholder-in-text", "literal '<video>'"),
        ({"videos": [["f1.png", "f2.png"]], "prompt": "Q"}, "videos[0]", "wrong-type", "a folder of frames"),
        ({"video": "data:video/mp4;base64,AAAA", "prompt": "Q"}, "video", "wrong-type", "is not a video"),
        ({"video": "a.png/", "prompt": "Q"}, "video", "video-unreadable", "'a.png/' is not a video"),
        ({"video": "bad.mp4", "prompt": "Q"}, "video", "video-unreadable", "'bad.mp4' is not a video"),
        ({"video": "link.mp4", "prompt": "Q"}, "video", "video-escapes", "leads outside"),
        ({"video": "linked", "prompt": "Q"}, "video", "video-escapes", "a link that leads out of its folder"),
        ({"video": "empty", "prompt": "Q"}, "video", "video-missing", "no image in this folder"),
        ({"video": "a.mp4", "prompt": "Q", "rejected_videos": ["b.mp4"]}, "rejected_videos", "column-not-read",
         "a video of one of the two responses"),
        ({"video": "a.mp4", "prompt": "Q", "audio": "a.wav"}, "audio", "column-not-read", "sound"),
        ({"video": "a.mp4", "question": "Q", "image": "a.png"}, "video", "column-not-read", "trl, llamafactory"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(folder: Path, row: dict[str, Any], key: str, kind: str, said: str) -> None:
    (folder / "bad.mp4").write_bytes(b"no video")
    outside = folder.parent / f"{folder.name}-outside.mp4"
    outside.write_bytes((folder / "a.mp4").read_bytes())
    (folder / "link.mp4").symlink_to(outside)
    (folder / "empty").mkdir()
    (folder / "linked").mkdir()
    (folder / "linked" / "0.png").symlink_to(folder / "a.png")
    good = {"image": "a.png", "question" if "question" in row else "prompt": "Q"}
    (problem,) = read(folder, good | PAIR, row | PAIR, max_bad_fraction=1.0).problems
    assert (problem.file, problem.row, problem.key) == (str(folder / "train.jsonl"), 2, key)
    assert problem.kind == kind
    assert said in problem.message + problem.remedy
    assert problem.remedy


def test_links_are_checked_even_where_nothing_else_is(folder: Path) -> None:
    (folder / "linked").mkdir()
    (folder / "linked" / "0.png").symlink_to(folder / "a.png")
    with pytest.raises(DataError, match="leads out of its folder"):
        read(folder, {"video": "linked", "prompt": "Q", **PAIR}, check_images="none")
    assert only(read(folder, {"video": "none.mp4", "prompt": "Q", **PAIR}, check_images="none")).videos


def test_pyav_is_asked_for_only_where_rows_have_videos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert only(read(folder, {"image": "a.png", "prompt": "Q", **PAIR})).images
    with pytest.raises(MissingPackageError, match=r'pip install "cwdpo\[video\]"'):
        read(folder, {"video": "a.mp4", "prompt": "Q", **PAIR}, max_bad_fraction=1.0)


# --- validate -----------------------------------------------------------------------------------------


def test_validate_decodes_counts_and_names(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "a.mp4").read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = b"\x55" * (end - start)
    (folder / "bad.mp4").write_bytes(data)
    for name, size in (("c", (64, 48)), ("d", (32, 32))):
        write_video(folder / f"{name}.ts", grey(5, size))
    (folder / "e.ts").write_bytes((folder / "c.ts").read_bytes() + (folder / "d.ts").read_bytes())
    rows = [
        {"video": "a.mp4", "prompt": "Q", **PAIR},
        {"videos": ["b.mp4", "frames"], "prompt": "Q", **PAIR},
        {"video": "e.ts", "prompt": "Q", **PAIR},
        {"video": "bad.mp4", "prompt": "Q", **PAIR},
        {"video": "a.mp4", "prompt": "Q", **PAIR},
        {"image": "a.png", "prompt": "Q", **PAIR},
    ]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text(json.dumps({"video": "b.mp4", "prompt": "Other", **PAIR}) + "\n")
    report = validate(file, fix=tmp_path / "good" / "good.jsonl")
    found = {group.kind: group.first[0] for group in report.problems}
    assert set(found) == {"video-damaged", "duplicate-row", "leak"}
    assert (found["video-damaged"].row, found["video-damaged"].key) == (4, "video")
    assert "'bad.mp4': frame" in found["video-damaged"].message
    assert (found["leak"].row, found["leak"].key) == (2, "videos[0]")
    text = report.to_text()
    assert "videos per example: 0: 1, 1: 3, 2: 1" in text
    # a.mp4: 2 s, b.mp4: 1 s, frames: 3 at 2 a second, e.ts: 10 at 10 a second; kept: 4, 2, 3, 2.
    assert (
        "videos read: 4, 5.5 seconds; 8 to 64 wide, 6 to 48 high (pixels); 3 to 20 frames, of which 2 to 4"
        in text
    )
    assert "1 of 4 videos whose frames change their size, scaled to that of the first frame" in text
    assert json.loads(report.to_json())["videos"]["changing"] == 1
    good = read_examples(tmp_path / "good" / "good.jsonl", max_bad_fraction=0.0).examples
    before = read(folder, *rows).examples
    assert [video_digest(e.videos[0]) for e in good if e.videos] == [
        video_digest(before[i].videos[0]) for i in (0, 2)
    ]


def test_a_fixed_file_has_folders_of_frames_and_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "good" / "good.jsonl"
    file = folder / "train.jsonl"
    file.write_text(json.dumps({"video": "frames", "prompt": "Q", **PAIR}) + "\n")
    validate(file, fix=out)
    example = only(read_examples(out, max_bad_fraction=0.0))
    assert greys(decoded(example.videos[0]).frames) == greys(decoded(VideoRef(folder / "frames")).frames)
    data = (folder / "a.mp4").read_bytes()
    source = rows_source([{"video": {"bytes": data, "path": "a.mp4"}, "prompt": "Q", **PAIR}], "rows")
    validate(source, fix=tmp_path / "more" / "bytes.jsonl")
    example = only(read_examples(tmp_path / "more" / "bytes.jsonl", max_bad_fraction=0.0))
    assert example.videos[0].path is not None
    assert example.videos[0].path.read_bytes() == data


# --- what keeps, splits and sends rows ------------------------------------------------------------------


def test_a_video_is_in_one_part_only(folder: Path) -> None:
    rows = [{"id": str(i), "video": f"{'ab'[i % 2]}.mp4", "prompt": f"Q{i}", **PAIR} for i in range(8)]
    (folder / "copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    rows.append({"id": "copy", "video": "copy.mp4", "prompt": "Q", **PAIR})
    parts = split_by_image(read(folder, *rows).examples, {"one": 0.5, "two": 0.5}, 0)
    ids = sorted(sorted(e.id for e in part) for part in parts.values())
    assert ids == [["0", "2", "4", "6", "copy"], ["1", "3", "5", "7"]]


def test_other_frames_are_other_inputs(folder: Path) -> None:
    row = {"video": "a.mp4", "prompt": "Q", **PAIR}

    def digests(row: Any = row, **options: Any) -> dict[str, Any]:
        return of_rows(read(folder, row, **options).examples)

    first = digests()
    assert digests() == first
    other = [digests({**row, "video": "b.mp4"}), digests(video=VideoSampling(max_frames=3))]
    data = (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(data + b"\0")
    other.append(digests())
    frames = {"video": "frames", "prompt": "Q", **PAIR}
    before = digests(frames)
    Image.new("RGB", (8, 6), "blue").save(folder / "frames" / "1.png")
    after = digests(frames)
    for one, two in [*((o, first) for o in other), (after, before)]:
        assert one["pictures"] != two["pictures"]
        assert (one["texts"], one["order"]) == (two["texts"], two["order"])


def test_sampled_rows_are_written_with_their_videos(folder: Path, tmp_path: Path) -> None:
    examples = read(folder, {"videos": ["a.mp4", "frames"], "prompt": "Q", **PAIR}).examples
    out = tmp_path / "out" / "pairs.jsonl"
    out.parent.mkdir()
    _write_jsonl(out, list(trl_rows(examples)))
    again = only(read_examples(out, max_bad_fraction=0.0))
    assert again.prompt == examples[0].prompt
    assert [greys(decoded(v).frames) for v in again.videos] == [
        greys(decoded(v).frames) for v in examples[0].videos
    ]
    with pytest.raises(DataError, match=r"videos are not written to \.parquet"):
        _write_parquet(tmp_path / "pairs.parquet", list(trl_rows(examples)))


def test_probe_sets_and_rounds_name_the_video(folder: Path, tmp_path: Path) -> None:
    import random

    (example,) = read(folder, {"video": "a.mp4", "prompt": "Q", **PAIR}).examples
    row = json.loads(to_jsonl([example], {}))
    assert row["videos"] == [str((folder / "a.mp4").resolve())]
    assert row["prompt"][0]["content"][0] == {"type": "video"}
    (pair,) = shown_pairs([example], random.Random(0), folder.resolve())
    assert (pair["image"], pair["video"]) == (None, "a.mp4")


def test_another_row_of_the_same_video_gives_no_negative(folder: Path) -> None:
    rows = [{"id": n, "video": f"{n[0]}.mp4", "prompt": "Q", **PAIR, "chosen": n} for n in ("a1", "a2", "b1")]
    one, same, other = read(folder, *rows).examples
    assert not _usable(one, same, frozenset())
    assert _usable(one, other, frozenset())


def test_videos_are_not_sent_to_servers(folder: Path) -> None:
    (example,) = read(folder, {"video": "a.mp4", "prompt": "Q", **PAIR}).examples
    with pytest.raises(ServerError, match="a prompt with a video is not sent to a server"):
        messages_of(Ask(example.prompt))
    judge = object.__new__(VlmJudge)
    with pytest.raises(ServerError, match=r"train\.jsonl:1: a prompt with a video is not sent to a judge"):
        judge._ask(example, "Which?")


def test_the_recipe_says_which_frames_are_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {path: x.jsonl, video: {fps: 1.5, max_frames: 8, max_pixels: null}}\n")
    assert load_recipe(recipe).data.video.sampling == VideoSampling(1.5, 8, None)
    recipe.write_text("data: {path: x.jsonl}\n")
    assert load_recipe(recipe).data.video.sampling == VideoSampling()
    for value in ("fps=0", "fps=.inf", "max_frames=0", "max_pixels=0", "frames=3"):
        with pytest.raises(ValueError, match=r"data\.video"):
            load_recipe(recipe, [f"data.video.{value}"])
