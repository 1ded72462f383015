"""Published results and the tables of pages that are made from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.errors import FileError, RunDirError
from cwdpo.lab.published import fill, filled, publish, stale
from cwdpo.lab.tables import to_csv
from cwdpo.report.summary import read_summary
from paths import ROOT
from small_study import summary_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA = ROOT / "docs" / "data"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    summary = summary_of({"cw_dpo": [0.5, 0.7], "dpo": [0.4, 0.5]})
    summary.write(folder)
    (folder / "table.csv").write_text(to_csv(summary))
    return folder


def test_a_page_takes_its_tables_from_published_results(study: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "data", tmp_path / "page.md"
    assert publish(study, data) == [data / "small" / "summary.json", data / "small" / "table.csv"]
    assert read_summary(data / "small").row("dpo").figures["judge_score"].per_seed == (0.4, 0.5)
    page.write_text("# A page\n\n<!-- table small differences judge_score -->\nold\n<!-- end -->\n\nMore.\n")
    assert stale([page], data) == [page]
    assert fill(page, data)
    text = page.read_text()
    assert "old" not in text
    assert "| variant | judge score, T=1 ↑ |\n|---|---|\n| DPO | -0.150 [" in text
    assert text.startswith("# A page\n\n<!-- table small differences judge_score -->\n")
    assert text.endswith("<!-- end -->\n\nMore.\n")
    assert not fill(page, data)
    assert stale([page], data) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("smal means", "no study 'smal'; did you mean 'small'"),
        ("small mean", "no table 'mean'; did you mean 'means'"),
        ("small means judge_scor", "no figure 'judge_scor'; did you mean 'judge_score'"),
        ("small", "a table is named by its study and its kind"),
    ],
)
def test_a_table_that_cannot_be_made(study: Path, tmp_path: Path, words: str, message: str) -> None:
    publish(study, tmp_path / "data")
    page = tmp_path / "page.md"
    page.write_text(f"<!-- table {words} -->\n<!-- end -->\n")
    with pytest.raises(RunDirError, match=r"page\.md: <!-- table") as error:
        filled(page.read_text(), page, tmp_path / "data")
    assert message in str(error.value)


def test_a_page_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe")
    for name, message in (("missing.md", "cannot be read"), ("bytes.md", "cannot be read as text")):
        with pytest.raises(FileError, match=rf"{name}: {message}"):
            fill(tmp_path / name, tmp_path)


def test_the_tables_of_the_docs_are_those_of_the_published_results() -> None:
    assert stale(PAGES, DATA) == []
