"""Single labelled responses: paired within a prompt where both labels are there, else refused with the reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.data import pairing
from cwdpo.data.read.reader import ReadResult, read_examples
from cwdpo.data.read.rows import rows_source
from cwdpo.data.validate.checks import validate
from cwdpo.errors import DataError

Rows = list[dict[str, Any]]


def labelled(prompt: Any, completion: Any, label: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        Image.new("RGB", (8, 6), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder: Path, rows: Rows, **options: Any) -> ReadResult:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(file, **options)


def said(result: ReadResult) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(e.prompt_text, e.chosen.text, tuple(n.text for n in e.rejected)) for e in result.examples}


ROWS = [
    labelled("Q", "good", True, image="a.png", id="x"),
    labelled("R", "fine", True, image="a.png"),
    labelled("Q", "bad", False, image="a.png", source="me"),
    labelled("Q", "worse", False, image="a.png"),
    labelled("R", "poor", False, image="a.png"),
    labelled("R", "fair", True, image="a.png"),
]


def test_every_good_response_is_paired_with_all_bad_ones_of_its_prompt(folder: Path) -> None:
    result = read(folder, ROWS)
    assert result.format == "kto"
    assert result.problems == []
    assert said(result) == {
        ("Q", "good", ("bad", "worse")),
        ("R", "fine", ("poor",)),
        ("R", "fair", ("poor",)),
    }
    assert [e.id for e in result.examples] == ["x", "train#2", "train#6"]
    assert [e.where[-2:] for e in result.examples] == [":1", ":2", ":6"]
    assert all(len(e.images) == 1 for e in result.examples)
    assert any("6 labelled rows of 2 prompts" in note for note in result.notes)


def test_the_order_of_rows_is_no_matter(folder: Path) -> None:
    rows = [labelled(f"Q{i}", f"{word}{i}", word == "good") for i in range(40) for word in ("good", "bad")]
    random.Random(3).shuffle(rows)
    assert said(read(folder, rows)) == {(f"Q{i}", f"good{i}", (f"bad{i}",)) for i in range(40)}


def test_another_picture_is_another_prompt(folder: Path) -> None:
    rows = [labelled("Q", "good", True, image="a.png"), labelled("Q", "bad", False, image="b.png")]
    with pytest.raises(DataError) as caught:
        read(folder, rows)
    text = str(caught.value)
    assert "2 of 2 rows are bad" in text
    assert "train.jsonl:1 [label]: all 1 responses to this prompt are labelled true" in text
    assert "train.jsonl:2 [label]: all 1 responses to this prompt are labelled false" in text
    assert "for SFT alone name 'label' in data.ignore_columns" in text
    held = [
        labelled("Q", "good", True, image=Image.new("RGB", (2, 2), "red")),
        labelled("Q", "bad", False, image=Image.new("RGB", (2, 2), "red")),
        labelled("Q", "other", False, image=Image.new("RGB", (2, 2), "blue")),
    ]
    result = read_examples(rows_source(held, "rows"), max_bad_fraction=1)
    assert said(result) == {("Q", "good", ("bad",))}
    assert [p.row for p in result.problems] == [3]


def test_without_the_labels_it_is_sft_data(folder: Path) -> None:
    result = read(folder, ROWS, ignore_columns=["label"])
    assert result.format == "trl"
    assert [(e.chosen.text, e.rejected) for e in result.examples][2] == ("bad", ())
    assert any("columns ignored as asked: label" in note for note in result.notes)


def test_ms_swift_s_labels_and_messages_as_completions(folder: Path) -> None:
    asked = {"role": "user", "content": "<image>Q"}
    rows: Rows = [
        {"images": ["a.png"], "messages": [asked, {"role": "assistant", "content": text}], "label": label}
        for text, label in (("good", True), ("bad", False))
    ]
    result = read(folder, rows)
    assert (result.format, said(result)) == ("kto", {("Q", "good", ("bad",))})
    assert result.examples[0].prompt[0].parts == (None, "Q")
    turns = [labelled([{"role": "user", "content": "Q"}], [{"role": "assistant", "content": t}], t == "good")
             for t in ("good", "bad", "worse")]  # fmt: skip
    assert said(read(folder, turns)) == {("Q", "good", ("bad", "worse"))}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (labelled("Q", "x", "yes"), "[label]: str ('yes'); allowed: true or false"),
        (labelled("Q", "x", 2), "[label]: int (2); allowed: true or false"),
        ({"prompt": "Q", "label": True}, "[completion]: the labelled response is missing"),
        ({"messages": [{"role": "user", "content": "Q"}], "label": True}, "[messages]: list"),
        (labelled("Q", "", True), "[chosen]: the chosen response is empty"),
    ],
)
def test_bad_labelled_rows_are_named(folder: Path, row: dict[str, Any], problem: str) -> None:
    rows = [labelled("Q", "good", True), labelled("Q", "bad", False), row]
    result = read(folder, rows, max_bad_fraction=1)
    assert len(result.examples) == 1
    (found,) = result.problems
    assert found.row == 3
    assert problem in str(found)


def test_many_rows_wait_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs, whether rows wait in memory or on disk."""
    rows = [
        labelled(f"Q{i}", f"{word}{i} {'x' * 500}", word == "good")
        for word in ("good", "bad")
        for i in range(300)
    ]
    in_memory = said(read(folder, rows))
    spilled = []
    real = pairing.tempfile.SpooledTemporaryFile

    class Spied(real):  # type: ignore[misc, valid-type]
        def rollover(self) -> None:
            spilled.append(True)
            super().rollover()

    monkeypatch.setattr(pairing.tempfile, "SpooledTemporaryFile", Spied)
    monkeypatch.setattr(pairing, "_IN_MEMORY", 10_000)
    assert said(read(folder, rows)) == in_memory
    assert spilled == [True]
    assert len(in_memory) == 300


def test_good_rows_are_written_as_pairs(folder: Path) -> None:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, labelled("S", "lone", True)]))
    report = validate(file, fix=folder / "good.jsonl")
    assert (report.format, report.good, report.bad) == ("kto", 3, 1)
    assert "7 labelled rows of 3 prompts" in report.to_text()
    again = read_examples(folder / "good.jsonl")
    assert again.format == "trl"
    assert said(again) == said(read_examples(file, max_bad_fraction=1))


def test_the_command_ignores_a_column_that_it_is_told_to(folder: Path, run: Any) -> None:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps({**row, "note": "x"}) + "\n" for row in ROWS))
    assert "format kto" in run("validate", file).out
    ignored = run("validate", file, "--ignore", "label", "--ignore", "note")
    assert (ignored.code, "format trl" in ignored.out) == (0, True)
    assert "columns ignored as asked: label, note" in ignored.out
    recipe = folder / "r.yaml"
    recipe.write_text(f"data: {{path: {file}, ignore_columns: label}}\n")
    assert "columns ignored as asked: label" in run("validate", recipe).out
