from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cwdpo.report._page import Folder
from cwdpo.report._study import mark, study_page
from cwdpo.report._tables import Entry, difference_entry
from cwdpo.report._text import number, picture_uri, visible
from cwdpo.report.figures import SLOTS, Line, colour, dash, line_chart
from cwdpo.report.summary import Caption, Figure, Mean, Point, Row, Summary


def test_a_variants_colour_is_its_place_among_the_shown(tmp_path: Path) -> None:
    mean = Mean(0.5, 0.4, 0.6, 2, (0.4, 0.6))
    curves = {"margin": (Point(0, 0.0, None, None), Point(1, 1.0, None, None))}
    names = ("zeta", "dpo", "cw_dpo")
    rows = tuple(Row(n, n.upper(), (), {"f": mean}, None, {}, {}, (), curves) for n in names)
    figures = (Figure("f", "f", "higher"),)
    found = Summary("t", "", "dpo", (0, 1), figures, rows, None, {}, {}, ("cw_dpo", "zeta"), (), {})
    for ordered in (rows, rows[::-1]):
        (group,) = study_page(Folder(tmp_path), replace(found, variants=ordered)).charts
        assert [(e.label, e.slot) for e in group.legend] == [("CW_DPO", 0), ("ZETA", 1)]
    styles = {(colour(slot), dash(slot)) for slot in range(2 * SLOTS)}
    assert len(styles) == 2 * SLOTS


@pytest.mark.parametrize(
    ("value", "bounds", "p", "word", "below", "tone"),
    [
        (0.2, (0.1, 0.3), 0.04, "better", ("0.100 to 0.300", "p = 0.040", "better"), "good"),
        (0.2, (0.1, 0.3), 0.0004, "worse", ("0.100 to 0.300", "p < 0.001", "worse"), "bad"),
        (0.2, (0.1, 0.3), 0.06, "no clear difference", ("0.100 to 0.300", "p = 0.060"), ""),
        (0.2, (0.1, 0.3), 0.01, "differs", ("0.100 to 0.300", "p = 0.010"), ""),
        (0.2, (None, None), None, "no clear difference", (), ""),
    ],
)
def test_a_difference_is_coloured_only_where_a_word_is_given(
    value: float, bounds: tuple[Any, Any], p: float | None, word: str, below: tuple[str, ...], tone: str
) -> None:
    assert difference_entry(value, *bounds, p, word, 3) == Entry("+0.200", below, tone)
    assert difference_entry(None, None, None, None, "not measured", 3).text == "not recorded"


def test_charts_of_the_same_data_share_no_identifier() -> None:
    line = Line("a", 0, [0, 1, 2], [1.0, 2.0, 0.00001234], [0.5, 1.0, 0.0], [1.5, 3.0, 1.0])
    one, two = line_chart("one", [line]), line_chart("two", [line])
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert one == line_chart("one", [line])


def test_a_weight_that_hardly_moves_is_drawn_on_the_whole_range() -> None:
    svg = line_chart("weight", [Line("a", 0, [0, 1], [0.99991, 0.99992])], whole=True)
    assert re.search(r">0\.0+<", svg)
    assert re.search(r">1\.0+<", svg)


def test_tick_labels_keep_their_digits() -> None:
    svg = line_chart("tiny", [Line("a", 0, [0, 1], [0.00012, 0.00019])])
    assert re.search(r">0\.00016<", svg)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tab\tand\nline", "tab\tand\nline"),
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"),
        ("naïve 猫 👩\u200d🚀", "naïve 猫 👩\u200d🚀"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("\u2028", "⟨U+2028⟩"),
    ],
)
def test_hidden_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_numbers() -> None:
    assert [number(v, 2) for v in (-0.001, -1.239, None, math.nan, True, "3")] == [
        "0.00", "−1.24", *["not recorded"] * 4,
    ]  # fmt: skip


def test_large_pictures_are_made_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    uri = picture_uri("noise.png", tmp_path)
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (256, 171)
    assert picture_uri("broken.png", tmp_path) is None
    assert picture_uri("a\0b", tmp_path) is None
    assert picture_uri(None, tmp_path) is None


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        ((True, 0, 0, 0, False), "all correct"),
        ((False, 2, 1, 0, False), "2 wrong, 1 hallucinated"),
        ((False, 0, 0, 3, True), "ill-formed"),
        ((False, 0, 0, 3, False), "3 omitted"),
    ],
)
def test_the_judges_verdict_in_words(marks: tuple[Any, ...], words: str) -> None:
    assert mark(Caption("x", "text", *marks)) == words


def test_negatives_by_round_are_shown_with_their_counts(tmp_path: Path) -> None:
    from cwdpo.report._negatives import negatives_section
    from cwdpo.report.render import write_report

    row = {
        "round": 1, "step": 10, "end": 20, "asked": 0.5, "prompts": 8, "left_out": 0, "short": 0, "samples": 32,
        "judged": False, "replaced_chosen": 0, "dropped": {"equal": 3},
        "by_origin": {
            "dataset": {"n": 4, "share": 0.5, "reference_mean_logp": -2.0},
            "on_policy": {"n": 4, "share": 0.5, "reference_mean_logp": None},
        },
        "pairs": [{
            "id": "<b>", "image": None, "chosen": "a red <i> dog", "rejected": "a blue <i> dog", "origin": "on_policy",
            "kind": "on_policy", "chosen_origin": "dataset", "made": {"step": 10, "mean_logp": -0.5},
        }],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "rounds.jsonl").write_text(json.dumps(row) + "\n")
    logged = [
        {"stage": "stage2", "step": s, "negatives/dataset/n": n, "negatives/dataset/weight": w}
        for s, n, w in ((10, 9, 9.0), (11, 1, 0.1), (20, 3, 0.5), (21, 9, 9.0))
    ]
    found = negatives_section(Folder(tmp_path), logged)
    dataset, own = found["rounds"][0]["origins"]
    assert dataset["weight"] == "0.400 (n = 4)", "by hand: (1 * 0.1 + 3 * 0.5) / 4, steps 11 to 20"
    assert own["age"] == "0 to 9 steps, mean 4.5"
    assert own["weight"] == own["reference"] == "not recorded"
    page = write_report(tmp_path).read_text()
    assert "<ins>red</ins>" in page
    assert "<del>blue</del>" in page
    assert "&lt;i&gt;" in page
