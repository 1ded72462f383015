"""What `perturb` makes of captions, as a table to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.lab.edits import read, table


def test_edits_are_counted_and_shown(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("A brown dog runs .\n\nNothing here\n")
    text = table(read(tmp_path / "captions.txt"), ["colour"], 5)
    assert text.startswith("1 of 2 captions (50.0%) yield at least one edit; 3 edits in all; 0 equal chosen")
    assert "| colour | 1 | 1 |" in text
    assert "| colour | A ~~brown~~ **" in text


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 0, "1 of 1 captions (100.0%) yield"),
        (("--kinds", "colour,colur"), 1, "negative source perturb: kinds.1"),
    ],
)
def test_the_command(run, tmp_path: Path, options: tuple[str, ...], code: int, said: str) -> None:
    (tmp_path / "captions.txt").write_text("A brown dog runs .\n")
    done = run("edits", tmp_path / "captions.txt", *options)
    assert done.code == code
    assert said in done.out + done.err
    assert run("edits", tmp_path / "absent.txt").err.startswith("cwdpo: ")
