"""What every data format keeps to, whichever the registry finds; and a format in a user's own file."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cwdpo.data.columns import MEANING
from cwdpo.data.formats.base import FORMATS, Columns, Format, find_format
from cwdpo.data.read.reader import read_examples
from cwdpo.data.validate.checks import validate
from cwdpo.errors import DataError, RecipeError, UnknownComponentError

NAMES = FORMATS.names()


def written(folder: Path, rows: Any, name: str = "train.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_formats_are_found_by_their_files() -> None:
    assert set(NAMES) >= {
        "trl", "captions", "kto", "llamafactory", "ms_swift", "povid", "rlaifv", "vlfeedback",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_format_is_known_by_each_of_its_sets_of_columns(name: str) -> None:
    for one in FORMATS.get(name).signatures():
        assert find_format("auto", one.need, "here").name == name


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_format_are_read_whole(tmp_path: Path, name: str) -> None:
    """By their columns alone; every column is used, and the picture has a place in the prompt."""
    file = written(tmp_path, FORMATS.get(name).examples)
    result = read_examples(file)
    assert (result.format, result.problems) == (name, [])
    assert result.examples
    assert not any("not read" in note for note in result.notes)
    for example in result.examples:
        assert example.prompt[-1].role == "user"
        assert sum(m.parts.count(None) for m in example.prompt) == len(example.images) == 1
        assert example.chosen.text.strip()
        assert example.extra == {}
    report = validate(file)
    assert (report.format, report.problems, report.unread) == (name, [], {})


@pytest.mark.parametrize("name", NAMES)
def test_a_format_reads_or_refuses_every_column_that_changes_a_row(tmp_path: Path, name: str) -> None:
    form = FORMATS.get(name)
    assert form.reads <= set(MEANING)
    for column in MEANING.keys() - form.reads - {"label"}:  # with `label` it would be another format
        rows = [{**row, column: ["something"]} for row in form.examples]
        result = read_or_problems(written(tmp_path, rows))
        assert f"[{column}]: ['something']: " in result, column
        assert "column-not-read" in result


def read_or_problems(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(file)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_other_columns_are_named_and_kept(tmp_path: Path, name: str) -> None:
    rows = [{**row, "annotator": f"no. {i}"} for i, row in enumerate(FORMATS.get(name).examples)]
    file = written(tmp_path, rows)
    result = read_examples(file)
    assert all(e.extra["annotator"].startswith("no. ") for e in result.examples)
    n = result.rows
    assert any(f"columns not read in training (kept for judges and metrics): annotator ({n} rows)" in note
               for note in result.notes)  # fmt: skip
    report = validate(file)
    assert report.unread == {"annotator": n}
    assert f"not read in training (kept for judges and metrics): annotator ({n} rows)" in report.to_text()
    assert json.loads(report.to_json())["unread"] == {"annotator": n}


@pytest.mark.parametrize("name", NAMES)
def test_a_format_declares_plain_words(name: str) -> None:
    form = FORMATS.get(name)
    assert form.__doc__
    for words in form.columns:
        assert Columns.of(words).need
        assert not Columns.of(words).need & Columns.of(words).without


# --- a new format, in one file --------------------------------------------------------------------------

SCORED = '''
from typing import ClassVar

from cwdpo.data.formats.base import Format
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text
from cwdpo.data.turns import asked, place_images
from cwdpo.records import Completion, Example


class Scored(Format):
    """A prompt with two answers and their scores."""

    columns = ("prompt answers scores",)
    examples: ClassVar = ({"prompt": "What?", "answers": ["a cat", "a dog"], "scores": [1, 0]},)
    least: float = 0.0

    def parse(self, row: Row) -> list[Example]:
        images = row.images()
        answers = [plain_text(a, "answers") for a in row.take("answers", "two strings")]
        scores = row.take("scores", "two numbers")
        if abs(scores[0] - scores[1]) <= self.least:
            return []
        best, worst = answers if scores[0] > scores[1] else answers[::-1]
        prompt, placed = place_images([asked(row, "prompt", len(images))], images, "prompt")
        return [row.example(prompt, placed, best, [("answers", Completion(worst))])]
'''
ROWS = [
    {"image": "a.png", "prompt": "What?", "answers": ["a cat", "a dog"], "scores": [1, 0], "note": "x"},
    {"image": "a.png", "prompt": "Who?", "answers": ["a cat", "a dog"], "scores": [0.4, 0.5]},
]


def test_a_format_of_one_s_own_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(SCORED)
    file = written(tmp_path, ROWS)
    with pytest.raises(DataError, match="write a format of your own"):
        read_examples(file)
    result = read_examples(file, format=f"{own}:Scored")
    assert result.format == "Scored"
    assert [(e.chosen.text, e.rejected[0].text) for e in result.examples] == [
        ("a cat", "a dog"),
        ("a dog", "a cat"),
    ]
    assert any("note (1 rows)" in note for note in result.notes)
    narrow = read_examples(file, format={"name": f"{own}:Scored", "least": 0.2})
    assert [e.chosen.text for e in narrow.examples] == ["a cat"]
    with pytest.raises(RecipeError, match="unknown key 'lest'; did you mean 'least'"):
        read_examples(file, format={"name": f"{own}:Scored", "lest": 0.2})
    with pytest.raises(UnknownComponentError, match="has no class 'Scores' derived from Format"):
        read_examples(file, format=f"{own}:Scores")
    with pytest.raises(DataError, match=r"\[videos\]: 'a.mp4': a video, which is not read"):
        read_examples(written(tmp_path, [{**ROWS[0], "videos": "a.mp4"}]), format=f"{own}:Scored")


def test_the_commands_take_it_too(tmp_path: Path, run: Any) -> None:
    own = tmp_path / "mine.py"
    own.write_text(SCORED)
    file = written(tmp_path, ROWS)
    said = run("validate", file, "--format", f"{own}:Scored")
    assert said.code == 0, said.err
    assert "format Scored" in said.out
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{path: {file}, format: {{name: '{own}:Scored', least: 0.2}}}}\n")
    assert "rows 2: 2 good, 0 bad (0.0%); 1 examples" in run("validate", recipe).out
    recipe.write_text(f"data: {{path: {file}, format: {{name: '{own}:Scored', lest: 0.2}}}}\n")
    failed = run("validate", recipe)
    assert (failed.code, "did you mean 'least'" in failed.err) == (1, True)


def test_evaluation_takes_it_too(tmp_path: Path) -> None:
    """What ``cwdpo evaluate --format`` hands on."""
    from cwdpo.evaluation.run import read_data

    own = tmp_path / "mine.py"
    own.write_text(SCORED)
    examples = read_data(str(written(tmp_path, ROWS)), {"limit": None, "format": f"{own}:Scored"})
    assert [e.chosen.text for e in examples] == ["a cat", "a dog"]


def test_a_new_format_takes_rows_from_an_old_one_by_asking_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more file in the folder; no other changes."""
    import cwdpo.data.formats as package

    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "scored.py").write_text(
        textwrap.dedent(SCORED).replace('"prompt answers scores"', '"chosen rejected scores"')
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    assert "scored" in FORMATS.names()
    assert find_format("auto", {"chosen", "rejected", "scores"}, "here").name == "scored"
    assert find_format("auto", {"prompt", "chosen", "rejected"}, "here").name == "trl"
    with pytest.raises(DataError, match=r"match several formats \(scored, trl\)"):
        find_format("auto", {"prompt", "chosen", "rejected", "scores"}, "here")
    monkeypatch.delitem(sys.modules, "cwdpo.data.formats.scored")


def test_formats_are_free_of_torch(tmp_path: Path) -> None:
    file = written(tmp_path, FORMATS.get("trl").examples)
    code = (
        "import sys\n"
        "from cwdpo.data.formats.base import FORMATS\n"
        "[FORMATS.get(name) for name in FORMATS.names()]\n"
        "from cwdpo.data.read.reader import read_examples\n"
        f"read_examples({str(file)!r})\n"
        "print(*(m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_format_of_a_user_is_a_format() -> None:
    assert all(issubclass(FORMATS.get(name), Format) for name in NAMES)
