"""Bars: drawn on a terminal, silent elsewhere."""

from __future__ import annotations

import re

import pytest

from cwdpo.cli.progress import bars, grid_bar, run_listener
from cwdpo.lab.grid import CellResult
from cwdpo.lab.progress import Progress
from cwdpo.records import Reading


def test_nothing_is_drawn_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with bars() as shown:
        shown.show("rows", 3, 5)
        shown.describe("rows", "text")
        shown.say("text")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_count_pace_and_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: stderr is a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with bars() as shown:
        shown.show("[rows]", 2, 5, "rows")
        shown.describe("[rows]", "[rows] of a file")
    text = capsys.readouterr().err
    assert "[rows] of a file" in text
    assert "2/5" in text


def run_a_study() -> None:
    progress = Progress({"a-seed0": 2, "b-seed0": 2})
    with grid_bar(progress) as on_event:
        for event in (("a-seed0", "stage2", 1, 2), ("a-seed0", "stage2", 2, 2)):
            progress.step(event[0])
            on_event(event)
        for result in (
            CellResult("a-seed0", "done", {}, None, 12.3),
            CellResult("b-seed0", "failed", {}, "DataError: [row] 3", 1.0),
        ):
            progress.end(result.key)
            on_event(result)


def test_a_study_without_a_terminal_names_its_finished_cells(capsys: pytest.CaptureFixture[str]) -> None:
    run_a_study()
    out, err = capsys.readouterr()
    lines = [line.strip() for line in err.splitlines()]
    assert out == ""
    assert lines == ["1/2 runs: a-seed0: done (12 s)", "2/2 runs: b-seed0: FAILED: DataError: [row] 3 (1 s)"]


def test_a_study_on_a_narrow_terminal_shows_its_counts_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Progress, "left", "about 12 min left")
    run_a_study()
    err = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    last = err.replace("\r", "\n").rstrip().splitlines()[-1].rstrip()
    assert last.startswith("2/2 runs")
    assert last.endswith("4/4 steps, about 12 min left")
    assert len(last) <= 80
    assert "b-seed0: FAILED: DataError: [row] 3 (1 s)" in err


def test_only_the_main_process_of_a_run_draws(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak() -> str:
        with run_listener() as listener:
            listener.phase("stage2: reference [pass]")
            listener.step("stage2", 3, 10)
            listener.sampled(1, 2, 8)
            listener.readings("stage2", {"margin": Reading("margin", 1.5, 3)})
            listener.note("long " * 50 + "end")
        return capsys.readouterr().err

    text = speak()
    assert "stage2: reference [pass]" in text
    assert "stage2 step 3: margin +1.500" in text
    assert "3/10" in text
    assert "samples of round 1" in text
    assert "note: " + "long " * 50 + "end\n" in text
    monkeypatch.setenv("RANK", "1")
    assert speak() == ""
