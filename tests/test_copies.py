"""Copies of a run folder, in one process. Two processes: tests/pipeline/test_apart.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.config import parse_recipe
from cwdpo.copies import MARK, copied, fetch_written, send_copies
from cwdpo.errors import RunDirError
from cwdpo.pipeline.resume import start_run
from cwdpo.rundir import RunDir


def test_one_process_has_no_copies(tmp_path: Path) -> None:
    notes: list[str] = []
    with copied(tmp_path, notes.append):
        send_copies()
        fetch_written(tmp_path)
    assert (notes, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_is_not_continued_in_a_copy(resume: bool, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text("node0: /data/runs/mine\n")
    recipe = parse_recipe({"data": {"path": "x.jsonl"}})
    with pytest.raises(RunDirError, match=r"is a copy of the run in node0: /data/runs/mine: start the first"):
        start_run(RunDir(tmp_path), recipe, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {MARK, ".lock"}
