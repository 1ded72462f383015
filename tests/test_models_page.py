"""docs/models.md has a row for every family that `make test-families` tries, and a column for every cell."""

from __future__ import annotations

import re
import sys

from paths import ROOT, TESTS

sys.path.insert(0, str(TESTS / "families"))
from cells import CELLS, PAGE, REFUSED, WORKS, written

_SOURCE = (TESTS / "families" / "checkpoints.py").read_text(encoding="utf-8")
NAMES = re.findall(r'^    "(\w+)": \(', _SOURCE.partition("\nFAMILIES: ")[2], re.MULTILINE)


def test_the_table_of_families_is_whole() -> None:
    head, _, *lines = written(PAGE.read_text(encoding="utf-8")).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert rows[0] == ["family", "rows", *CELLS]
    assert [row[0] for row in rows[1:]] == NAMES
    assert len(NAMES) >= 19
    for _, layout, *cells in rows[1:]:
        assert layout in ("shared", "plain")
        assert len(cells) == len(CELLS)
        assert set(cells) <= {WORKS, REFUSED}


def test_the_environment_of_families_is_part_of_what_must_pass() -> None:
    assert "make test-families" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
