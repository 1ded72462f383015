"""The validation report counts what is there, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cwdpo.data.validate import ValidationReport, validate
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
    assert report.response_words == {"chosen": {"1-4": 5, "500+": 1}, "rejected": {"1-4": 5, "10-19": 1}}


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
    assert data["images"] == {"n": 3, "width": [10, 40], "height": [30, 50], "modes": {"L": 2, "RGB": 1}}
    assert {group["kind"] for group in data["problems"]} == {group.kind for group in report.problems}
    text = report.to_text()
    assert "rows 8: 5 good, 3 bad (37.5%); 6 examples" in text
    assert "images read: 3; 10 to 40 wide, 30 to 50 high (pixels); L: 2, RGB: 1" in text
    assert "words in chosen: 1-4: 5, 500+: 1" in text
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
    assert (report.rows, report.good, report.bad, report.examples, report.response_words) == (1, 0, 1, 0, {})
    (tmp_path / "train.jsonl").write_text("broken\nbroken\n")
    with pytest.raises(DataError, match="none of the first 2 rows can be read\n  malformed-json x 2"):
        validate(tmp_path)
