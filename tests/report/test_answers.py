"""The top of a study's page: differences by certainty, and the table of the most important figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cwdpo.lab.outcome import compared
from cwdpo.report._answers import comparison_levels, head_table, same_sign, study_levels
from cwdpo.report.render import write_running
from cwdpo.report.summary import CellState, Figure, Mean, Panel, Row, Summary

SHORT = Figure("short", "short", "lower", 2)
RIGHT = Figure("right", "right", "higher", 2)
LENGTH = Figure("length", "length", "none", 2)


def mean(*values: float | None) -> Mean:
    known = [v for v in values if v is not None]
    return Mean(sum(known) / len(known) if known else None, None, None, len(known), values)


def row(name: str, rival: str | None, short: Mean, right: Mean) -> Row:
    cells = tuple(
        CellState(s, "waiting" if v is None else "done", None, 1.0) for s, v in enumerate(short.per_seed)
    )
    figures = {"short": short, "right": right, "length": mean(1.0, 2.0, 3.0)}
    return Row(name, name.upper(), (), figures, rival, {}, {}, cells)


def summary() -> Summary:
    """Of the hot ones, B is certainly worse than A in `short`, and in every seed, but not certainly, in `right`."""
    figures = (SHORT, RIGHT, LENGTH)
    rows = [
        row("a", None, mean(0.1, 0.2, 0.3), mean(0.5, 0.6, 0.7)),
        row("b", "a", mean(0.2, 0.1, 0.4), mean(0.5, 0.7, 0.6)),
        row("a-hot", "a", mean(0.1, 0.3, 0.3), mean(0.5, 0.6, 0.7)),
        row("b-hot", "a-hot", mean(0.6, 0.8001, 0.7999), mean(0.4, 0.3, 0.69)),
    ]
    return Summary(
        title="T", question="Q?", full="a", seeds=(0, 1, 2), figures=figures, variants=compared(rows, figures),
        panel=Panel(("own", "hot"), {"A": ("a", "a-hot"), "B": ("b", "b-hot")}), shared={}, base={}, shown=(),
        gallery=(), provenance={}, head=("short", "right", "length"),
    )  # fmt: skip


def test_differences_are_told_by_their_certainty() -> None:
    certain, steady, rest = study_levels(summary())
    assert certain.lines == ["short: A-HOT 0.23 better than B-HOT 0.73, p < 0.001"]
    assert "all 3 seeds, but not certain" in steady.title
    assert [line[:43] for line in steady.lines] == ["right: A-HOT 0.60 better than B-HOT 0.46, p"]
    # Two figures and three pairs: `length` has no better direction, and A-HOT minus A differs in no figure clearly.
    assert rest.lines == ["4 of 6 comparisons: no difference that has the same sign in every seed."]


def test_the_column_in_which_methods_differ_is_the_first_of_the_table() -> None:
    table = head_table(summary())
    assert table is not None
    assert list(table.groups) == [("hot", 2), ("own", 2)]
    assert [head for head, _ in table.columns] == ["short\u00a0↓", "right\u00a0↑"] * 2
    (first, _, ours), (second, _, theirs) = table.rows
    assert (first, second) == ("A", "B")
    assert [e.text for e in ours] == ["0.23", "0.60", "0.20", "0.60"]
    assert [(e.text, e.below, e.tone) for e in theirs] == [
        ("0.73", ("worse, certain",), "bad"), ("0.46", ("worse, 3/3",), ""),
        ("0.23", (), ""), ("0.60", (), ""),
    ]  # fmt: skip
    assert head_table(replace(summary(), panel=None)) is None
    assert head_table(replace(summary(), head=())) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ((1.0, 2.0), (0.0, 1.0), True),
        ((1.0, 1.0), (0.0, 2.0), False),
        ((1.0, 1.0), (0.0, 1.0), False),
        ((1.0, None), (0.0, 1.0), True),
    ],
)
def test_the_sign_of_a_difference_by_seed(
    ours: tuple[float, ...], theirs: tuple[float, ...], same: bool
) -> None:
    assert same_sign(mean(*ours), mean(*theirs)) == same


def test_a_study_that_runs_has_a_page_with_what_is_known(tmp_path: Path) -> None:
    rows = [
        row("a", None, mean(0.1, 0.2, 0.3), mean(0.5, 0.6, 0.7)),
        row("b", "a", mean(None, None, None), mean(None, None, None)),
    ]
    part = replace(
        summary(),
        variants=compared(rows, (SHORT, RIGHT, LENGTH)),
        panel=Panel(("own",), {"A": ("a",), "B": ("b",)}),
    )
    write_running(tmp_path, part, "Running: 3 of 6 runs done, about 2 min left.", 5)
    page = (tmp_path / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="5">' in page
    assert "3 of 6 runs done, about 2 min left" in page
    assert "…" in page
    assert "failed" not in page
    assert "Certain (p" not in page, "nothing is compared yet"


def test_a_comparison_of_runs_says_first_what_is_certain() -> None:
    figures = [{"key": "right", "label": "right", "digits": 2, "better": "higher"}]
    pairs = [("x", "y", "better", 0.01), ("x", "z", "no clear difference", 0.4)]
    found = comparison_levels({
        "figures": figures,
        "differences": [
            {"ours": a, "theirs": b, "figures": {
                "right": {"value": 0.25, "low": 0.1, "high": 0.4, "p_corrected": p, "word": word},
            }} for a, b, word, p in pairs
        ],
    })  # fmt: skip
    assert [list(level.lines) for level in found] == [
        ["right: x better than y, +0.25 (0.10 to 0.40)"],
        ["1 of 2 comparisons."],
    ]
    assert comparison_levels({}) == []
