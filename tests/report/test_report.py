from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cwdpo.errors import RunDirError
from cwdpo.report.render import write_report
from cwdpo.report.summary import (
    Bin,
    Caption,
    CellState,
    Figure,
    Mean,
    Panel,
    Picture,
    Point,
    Row,
    Summary,
    read_summary,
)

HOSTILE = (
    "a <script>alert(1)</script> </style> \"quoted\" 'single' \u202eevil\u202c \x00\x07 {{ 7*7 }} & $x^2$"
)
KINDS = ("hard", "medium", "one_word", "off_distribution", "easy")
FIGURES = (
    ("sampled_correct", "all correct, temperature 1", "higher", 3),
    ("greedy_correct", "all correct, greedy", "higher", 3),
    ("ill_formed", "ill-formed", "lower", 3),
    ("ece", "token ECE", "lower", 4),
    ("chosen_drift", "Δ log p of chosen, nats/token", "none", 2),
    ("grad_cv", "gradient norm, CV", "lower", 2),
    ("win_rate", "win rate against SFT", "higher", 3),
)
METHODS = (
    ("cw_dpo", "CW-DPO"), ("dpo", "DPO"), ("sft", "SFT, continued"), ("dpo_sft", "DPO + SFT term"),
    ("cw_constant", "CW-DPO, constant weight"),
)  # fmt: skip


def picture(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (64, 64), (236, 236, 232))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, r = (int(v) for v in rng.integers(8, 40, 3))
        colour_ = tuple(int(v) for v in rng.integers(30, 220, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(
            (x, y, x + r / 2 + 8, y + r / 2 + 8), fill=colour_
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def readings_of(stage: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    sign = -1.0 if stage == "stage2" else 0.3
    for step in range(0, 101, 10):
        t = step / 100
        found = {"nll": 0.9 - 0.3 * t, "chosen_shift": 2 * t - 2.4 * t * t, "rejected_shift": 9 * sign * t}
        found |= {"margin": found["chosen_shift"] - found["rejected_shift"], "entropy": 0.7 - 0.3 * t}
        found |= {
            "top1": 0.7 + 0.1 * t,
            "tv": 0.15 * t,
            "js": 0.04 * t,
            "kl": 0.1 * t,
            "ece": 0.02 + 0.01 * t,
        }
        found |= {f"delta_logp/{k}": sign * i * 0.3 * t for i, k in enumerate(("chosen", *KINDS))}
        if stage == "stage2":
            found |= {f"cooling/weight/{k}": max(0.02, 0.8 - 0.15 * i - 0.3 * t) for i, k in enumerate(KINDS)}
        for name, value in found.items():
            noisy = value + float(rng.normal(0, 0.01))
            rows.append({"stage": stage, "name": name, "value": noisy, "n": 64, "unit": "nats", "step": step})
    rows[-1]["value"] = None  # the mean of nothing
    return rows


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    objective = "\n    ".join(["name: cw_dpo", "beta: 0.3", "floor: auto", "tau: auto"])
    (folder / "recipe.yaml").write_text(
        "name: shapes, gentle start\nseed: 0\nmodel:\n  path: embedded\n  tune: full\ndata:\n  path: null\n"
        "  world:\n    seed: 3\n    train: 2000\n    validation: 200\n"
        "stage1:\n  enabled: true\n  objective:\n    name: sft_constrained\n    target: 0.8\n"
        f"  learning_rate: 0.0002\n  steps: 100\nstage2:\n  enabled: true\n  objective:\n    {objective}\n"
        "  learning_rate: 0.0001\n  steps: 100\n"
        "# </pre></details><script>alert(2)</script>\n"
    )
    versions = {"cwdpo": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "not installed"}
    environment = {
        "packages": versions,
        "python": "3.11.2",
        "platform": "Linux-6.1",
        "command": "cwdpo train r.yaml",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    problems = [{"stage": "read", "problem": f"train.jsonl: row {i}: no chosen response"} for i in range(29)]
    jsonl(folder / "problems.jsonl", [{"stage": "read", "problem": f"row 0: {HOSTILE}"}, *problems])
    logps = [round(float(v), 6) for v in -rng.gamma(4.0, 0.12, 200)]
    floor, tau = float(np.quantile(logps, 0.1)), 0.31
    (folder / "calibration.json").write_text(
        json.dumps({"floor": floor, "tau": tau, "n": 200, "mean_logps": logps})
    )
    metrics = []
    for stage in ("stage1", "stage2"):
        for step in range(1, 101, 3):
            row = {
                "stage": stage,
                "step": step,
                "loss": 0.7 - step / 300,
                "grad_norm": float(rng.gamma(5, 0.3)),
            }
            if stage == "stage2":
                w = 0.5 - step / 400
                row |= {"cooling/weight_mean": w, "cooling/weight_p10": w / 4, "cooling/weight_p90": w + 0.3}
            metrics.append(row)
        metrics.append({"stage": stage, "step": 100, "train_runtime": 41.0, "train_loss": 0.5})
    jsonl(folder / "metrics.jsonl", metrics)
    jsonl(folder / "readings.jsonl", [*readings_of("stage1", rng), *readings_of("stage2", rng)])
    samples = []
    for i in range(30):
        picture(folder / "data" / f"{i}.png", i)
        text = f"a large red circle at the top left, {i} small blue squares to the right of it"
        said = HOSTILE if i == 1 else text
        responses = [{"temperature": t, "text": said, "ended": t == 0} for t in (0.0, 1.0, 1.0)]
        image = None if i == 2 else str(folder / "data" / f"{i}.png")
        row = {"id": f"val-{i}", "image": image, "prompt": "Describe the image.", "chosen": text}
        samples.append({**row, "responses": responses})
    jsonl(folder / "samples.jsonl", samples)
    generated = {"prompts": 30, "ended_share": 0.97, "mean_words": 14.2, "distinct_share": 0.93}
    (folder / "summary.json").write_text(
        json.dumps({"name": "x", "seed": 0, "stages": {}, "generated": generated})
    )
    return folder


def mean_of(value: float, seeds: list[float | None], half: float | None = None) -> Mean:
    low, high = (None, None) if half is None else (value - half, value + half)
    return Mean(value, low, high, sum(s is not None for s in seeds), tuple(seeds))


def variant(name: str, label: str, place: int, *, hot: bool = False, failed: tuple[int, ...] = ()) -> Row:
    rng = np.random.default_rng(place + 100 * hot)
    drop = (0.02 if name.startswith("cw") else 0.11) * hot
    centre = {
        "sampled_correct": 0.652 - 0.021 * place - drop, "greedy_correct": 0.781 - 0.008 * place - drop,
        "ill_formed": 0.021 + 0.011 * place + drop / 2, "ece": 0.0161 + 0.0052 * place + drop / 3,
        "chosen_drift": -0.041 - 0.113 * place - 4 * drop, "grad_cv": 0.262 + 0.311 * place,
        "win_rate": 0.541 - 0.0042 * place,
    }  # fmt: skip
    figures = {}
    for key, value in centre.items():
        seeds = [None if s in failed else value + float(rng.normal(0, abs(value) * 0.01)) for s in range(3)]
        known = [s for s in seeds if s is not None]
        figures[key] = (
            mean_of(float(np.mean(known)), seeds, abs(value) * 0.03)
            if known
            else Mean(None, None, None, 0, (None,) * 3)
        )
    curves: dict[str, tuple[Point, ...]] = {}
    scale = (1 + place) * (2 if hot else 1)
    ends = {
        "chosen_shift": -scale,
        "rejected_shift": -4.0 * scale,
        "margin": 3.0 * scale,
        "entropy": 0.1 * scale,
    }
    ends |= {"grad_norm": scale, "nll": 0.1 * scale, "kl": 0.02 * scale}
    ends |= {f"delta_logp/{k}": -0.2 * i * scale for i, k in enumerate(("chosen", *KINDS))}
    if name == "cw_dpo":
        ends |= {f"cooling/weight/{k}": 0.8 - 0.17 * i for i, k in enumerate(KINDS)}
    for key, end in ends.items():
        values = [
            (s, end * math.sqrt(s / 300) + float(rng.normal(0, abs(end) * 0.03))) for s in range(0, 301, 25)
        ]
        curves[key] = tuple(Point(s, v, v - abs(end) * 0.1, v + abs(end) * 0.1) for s, v in values)
    centres = np.linspace(0.15, 0.98, 12)
    bins = tuple(Bin(float(c), float(c - 0.02 * place * (1 - c)), int(40 + 900 * c**4)) for c in centres)
    shown = not hot and len(failed) < 3
    error = f"NonFiniteError: step 41: the loss is nan on examples {HOSTILE}"
    return Row(
        name=f"{name}-hot" if hot else name,
        label=f"{label}, 4x" if hot else label,
        overrides=(f"stage2.learning_rate={1e-4 / (1 + place)}",),
        figures=figures,
        rival=None
        if name == "cw_dpo" and not hot
        else "cw_dpo-hot"
        if hot and name != "cw_dpo"
        else "cw_dpo",
        against={},
        calibration={"floor": (-0.5, -0.6, -0.55)} if name == "cw_dpo" else {},
        cells=tuple(
            CellState(s, "failed" if s in failed else "done", error if s in failed else None, 37.4 + s)
            for s in range(3)
        ),
        curves=curves if shown else {},
        reliability=bins if shown else (),
    )


def study_summary() -> Summary:
    from cwdpo.lab.outcome import compared

    swept = [variant(n, label, i, failed=(2,) if n == "dpo" else ()) for i, (n, label) in enumerate(METHODS)]
    hot = [
        variant(n, label, i, hot=True, failed=(0, 1, 2) if n == "cw_constant" else ())
        for i, (n, label) in enumerate(METHODS)
    ]
    figures = tuple(Figure(k, n, b, d, f"About {n}.") for k, n, b, d in FIGURES)  # type: ignore[arg-type]
    gallery = tuple(
        Picture(
            f"pictures/{i}.png",
            "a small red circle; a large blue square",
            tuple(
                Caption(
                    label, HOSTILE if (i, j) == (0, 1) else "a small red circle above a blue square",
                    (i + j) % 2 == 0, 1, 0, j, j == 3,
                )
                for j, (_, label) in enumerate(METHODS)
            ),
        )
        for i in range(6)
    )  # fmt: skip
    return Summary(
        title="Cooling against plain DPO in the shapes world",
        question="Five methods continue from one base model on the same 1600 pairs, each at its own learning rate.",
        full="cw_dpo",
        seeds=(0, 1, 2),
        figures=figures,
        variants=compared([*swept, *hot], figures),
        panel=Panel(("swept", "4 times the rate"), {label: (n, f"{n}-hot") for n, label in METHODS}),
        shared={},
        base={k: Mean(0.37, None, None, 1, (0.37,)) for k, *_ in FIGURES[:3]},
        shown=tuple(n for n, _ in METHODS),
        gallery=gallery,
        provenance={"command": "cwdpo demo", "commit": "abc", HOSTILE: HOSTILE},
    )


def make_study(folder: Path) -> Path:
    for i in range(5):  # the sixth picture is missing
        picture(folder / "pictures" / f"{i}.png", i)
    folder.mkdir(parents=True, exist_ok=True)
    study_summary().write(folder)
    return folder


class Page(HTMLParser):
    """Tags, attributes, visible text and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.exact: list[tuple[str, str]] = []
        self._data: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._data = dict(attrs).get("value") if tag == "data" else None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._data is not None:
            self.exact.append((self._data, data))
            self._data = None

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("study"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module", params=["run_folder", "study_folder"])
def html(request: pytest.FixtureRequest) -> str:
    return (request.getfixturevalue(request.param) / "report.html").read_text(encoding="utf-8")


def test_the_page_can_load_and_run_nothing(html: str) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    policies = [
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
    assert not re.search(r"https?://|@import", html)
    assert tags.count("style") == 1


def test_hostile_text_is_shown_and_does_nothing(html: str) -> None:
    assert "<script" not in html.lower()
    assert html.count("</style>") == 1
    assert not [c for c in html if c in "\u202e\u202c\x00\x07"]
    words = Page(html).words()
    assert (
        "a <script>alert(1)</script> </style> \"quoted\" 'single' ⟨U+202E⟩evil⟨U+202C⟩ ⟨U+0000⟩⟨U+0007⟩"
        in words
    )
    assert "{{ 7*7 }} & $x^2$" in words


def test_identifiers_are_unique_and_resolve(html: str) -> None:
    ids = [a["id"] for _, a in Page(html).tags if a.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {a or b for a, b in used} <= set(ids)


def test_no_stand_in_colour_is_left(html: str) -> None:
    assert not re.search(r"#f[de]00[0-9a-f]{2}", html)
    assert "var(--c0)" in html


def test_run_page_tells_what_was_run_and_what_came_out(run_folder: Path) -> None:
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    words = Page(html).words()
    calibration = json.loads((run_folder / "calibration.json").read_text())
    readings = [json.loads(line) for line in (run_folder / "readings.jsonl").read_text().splitlines()]
    nll = [r["value"] for r in readings if r["stage"] == "stage1" and r["name"] == "nll"]
    ece = [r["value"] for r in readings if r["stage"] == "stage2" and r["name"] == "ece"]
    for text in (
        "sft_constrained, 100 of 100 steps", "cw_dpo, 100 of 100 steps", "embedded world (seed 3",
        f"Held-out NLL, start {nll[0]:.3f}", f"Held-out NLL, end {nll[-1]:.3f}", f"Token ECE {ece[-1]:.3f}",
        f"Floor −{-calibration['floor']:.3f}", "Tau 0.310", "transformers 5.23.0",
        "30 in all; the first 20", "24 of 30", "cut at the length limit", "image not available",
        "Cooling weight in training", "Gradient norm", "off_distribution",
    ):  # fmt: skip
        assert text in words, text
    assert words.count("no chosen response") == 19  # and the hostile one makes 20
    assert html.count("data:image/") == 23  # 24 samples are shown, one has no picture
    assert "name: sft_constrained" in words


def test_a_reading_without_a_value_is_not_a_zero(tmp_path: Path) -> None:
    rows = [{"stage": "stage2", "name": "kl", "value": None, "n": 0, "unit": "nats", "step": 5}]
    jsonl(tmp_path / "readings.jsonl", rows)
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).words()
    assert "KL to the start no value step 5, nats, n = 0" in words
    assert "Held-out margin not recorded" in words


RUN_FILES = (
    "recipe.yaml", "environment.json", "problems.jsonl", "calibration.json", "metrics.jsonl", "readings.jsonl",
    "samples.jsonl", "summary.json",
)  # fmt: skip


@pytest.mark.parametrize("how", ["missing", "empty", "broken"])
def test_any_missing_file_is_said_to_be_missing(tmp_path: Path, how: str) -> None:
    for name in RUN_FILES:
        if how != "missing":
            (tmp_path / name).write_text("" if how == "empty" else "{]\n{]\n")
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).words()
    for part in ("Model not recorded", "Samples: not recorded", "Versions: not recorded", "Tau not recorded"):
        assert part in words
    assert ("could not be read" in words) == (how == "broken")
    assert ("calibration.json: is not JSON" in words) == (how == "broken")


def test_one_missing_file_leaves_the_rest(tmp_path: Path, run_folder: Path) -> None:
    for name in ("recipe.yaml", "readings.jsonl", "summary.json"):
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(run_folder, tmp_path, ignore=shutil.ignore_patterns(name, "report.html"))
        assert Page(write_report(tmp_path).read_text(encoding="utf-8")).words().count("Headline numbers") == 1


def test_no_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no such folder; name the folder of a run"):
        write_report(tmp_path / "none")


def test_every_number_of_the_table_is_the_summarys(study_folder: Path) -> None:
    summary = read_summary(study_folder)
    page = Page((study_folder / "report.html").read_text(encoding="utf-8"))
    expected = []
    for means in [summary.base, *(v.figures for v in summary.variants)]:
        for key, _, _, digits in FIGURES:
            mean = means[key].mean if key in means else None
            if mean is not None:
                expected.append((repr(mean), f"{mean:.{digits}f}".replace("-", "−")))
    assert page.exact == expected
    dpo = summary.row("dpo").figures["ece"]
    assert f"{dpo.low:.4f} to {dpo.high:.4f}" in page.words()


def test_verdicts_are_corrected_for_the_number_of_comparisons(study_folder: Path) -> None:
    """Nine variants have a rival; the page says so, and a word stands only where the corrected p allows it."""
    summary = read_summary(study_folder)
    words = Page((study_folder / "report.html").read_text(encoding="utf-8")).words()
    assert len(summary.compared) == 9
    assert "corrected (Holm) for the 9 comparisons of a column" in words
    sft = summary.row("sft").against["grad_cv"]
    assert sft.p is not None
    assert sft.p_corrected is not None
    assert sft.p < sft.p_corrected < 0.05
    assert (sft.word, f"p = {sft.p_corrected:.3f} worse" in words) == ("worse", sft.p_corrected >= 0.001)
    assert summary.row("cw_constant-hot").against["grad_cv"].word == "not measured"
    assert "minus CW-DPO, 4x" in words


def test_failed_runs_are_shown_with_their_errors(study_folder: Path) -> None:
    words = Page((study_folder / "report.html").read_text(encoding="utf-8")).words()
    assert "DPO 1 of 3 failed" in words
    assert "DPO, seed 2: NonFiniteError: step 41: the loss is nan on examples a <script>" in words
    assert words.count("failed NonFiniteError: step 41") == 4
    assert "CW-DPO, constant weight, 4x 3 of 3 failed not recorded" in words
    without = replace(study_summary(), shown=("dpo", "cw_constant-hot"))
    without.write(study_folder.parent)
    assert (
        "CW-DPO, constant weight, 4x no finished run"
        in Page(write_report(study_folder.parent).read_text()).words()
    )


def test_captions_carry_the_judges_marks(study_folder: Path) -> None:
    html = (study_folder / "report.html").read_text(encoding="utf-8")
    words = Page(html).words()
    assert words.count("✓ all correct") == 15
    assert "✗ ill-formed" in words
    assert html.count("data:image/png") == 5
    assert "image not available" in words  # the sixth is missing
    assert "✗ 1 wrong, 2 omitted" in words


def test_a_study_without_curves_and_captions_is_still_a_page(tmp_path: Path) -> None:
    plain = replace(study_summary(), shown=(), gallery=(), panel=None, base={})
    plain.write(tmp_path)
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).words()
    assert plain.title in words
    assert not [
        part for part in ("Captions", "Learning curves", "Reliability", "From swept") if part in words
    ]


@pytest.mark.parametrize("part", ["variants", "figures", "seeds", "provenance", "full", "gallery"])
def test_a_study_without_a_part_is_refused_by_its_name(tmp_path: Path, part: str) -> None:
    tree = asdict(replace(study_summary(), shown=()))
    del tree[part]
    (tmp_path / "summary.json").write_text(json.dumps(tree))
    with pytest.raises(RunDirError, match=f"summary.json: {part}: Field required; another version wrote it"):
        write_report(tmp_path)


def test_a_demo_of_an_older_version_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"kind": "demo", "title": "x", "methods": []}))
    with pytest.raises(RunDirError, match=r"run the same command \(cwdpo ablate or cwdpo demo\) again"):
        write_report(tmp_path)


def test_no_torch_is_imported() -> None:
    code = "import sys, cwdpo.report.render; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
