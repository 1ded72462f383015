"""``cwdpo bench gpu`` on the small model: parts against each other, and a report that says what did not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.cli.bench import gpu_text
from cwdpo.lab.bench import gpu as bench
from cwdpo.lab.bench import measure
from cwdpo.lab.bench.gpu import Part, gpu_report
from cwdpo.lab.bench.rounding import rounding_report
from cwdpo.lab.bench.setting import Setting

SMALL = Setting(prompt_tokens=64, completion_tokens=8)


def test_a_part_that_fails_or_has_no_time_is_said_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def fails() -> Any:
        seen.append(list(json.loads((tmp_path / "gpu.json").read_text())["parts"]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    parts = [
        Part("sampling a", 0.0, lambda: SAMPLED),
        Part("step b", 0.0, fails),
        Part("step c", 99.0, fails),
        Part("sampling d", 0.0, lambda: SAMPLED),
    ]
    monkeypatch.setattr(bench, "_parts", lambda *_: iter(parts))
    report = gpu_report(
        SMALL, tmp_path / "gpu.json", minutes=50.0, repeats=1, threads=1, say=lambda text: None
    )
    assert report == json.loads((tmp_path / "gpu.json").read_text())
    assert seen == [["sampling a"]]  # written before the next part
    assert report["parts"]["sampling a"] == report["parts"]["sampling d"] == SAMPLED
    assert report["parts"]["step b"] == {"failed": "OutOfMemoryError: CUDA out of memory"}
    assert report["parts"]["step c"]["left_out"].startswith("it takes about 99 minutes, and ")
    text = gpu_text(report)
    assert "failed: OutOfMemoryError" in text
    assert "left out: it takes about 99 minutes" in text
    assert text.count("2.00 times (1.50 to 3.00)") == 2


SAMPLED = {
    "prompts": 4,
    "samples": 4,
    "tokens_per_second": {"generate": 10.0, "cwdpo": 20.0},
    "time": {"median": 2.0, "min": 1.5, "max": 3.0},
}


def test_without_a_gpu_the_command_says_so(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("bench", "gpu")
    assert (done.code, "torch finds no CUDA GPU here" in done.err) == (1, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_kind_of_part_runs_on_the_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process for each step whose memory is measured: tests/lab/test_bench.py has those.
    monkeypatch.setattr(measure, "_in_new_process", lambda *_: 1)
    parts_of = bench._parts  # the other steps differ in the setting only
    left_out = (
        "step 3b",
        "step 3b, 4 negatives",
        "step 3b, live reference",
        "step 7b",
        "step 7b, 4 negatives",
    )
    monkeypatch.setattr(bench, "_parts", lambda *a: (p for p in parts_of(*a) if p.name not in left_out))
    report = gpu_report(
        SMALL, tmp_path / "gpu.json", minutes=60.0, repeats=1, threads=1, say=lambda text: None
    )
    parts = report["parts"]
    assert not [name for name, part in parts.items() if "failed" in part or "left_out" in part]
    for name, gap in parts["exactness"].items():
        assert 0 <= gap["mean"] <= gap["largest"] < 1e-4, name
    for name, part in parts.items():
        if name.startswith("step"):
            assert part["gradient"]["largest_difference"] <= 1e-5 * max(1.0, part["gradient"]["largest"]), (
                name
            )
    assert parts["step 7b, nf4"]["setting"]["quantization"] == "nf4"
    # A second prompt adds activations; recomputing them keeps less.
    planned = {(row["prompts"], row["checkpointing"]): row["planned"] for row in parts["batches 3b"]}
    assert planned[2, False] > planned[1, False] > planned[1, True]
    assert planned[2, True] < planned[2, False]
    assert [row["n"] for row in parts["images"]["workers"]] == [0, 2, 4]
    assert gpu_text(report).count("\n\n") == len(parts)


@pytest.mark.slow
def test_half_precision_is_told_from_sharing() -> None:
    found = rounding_report(replace(SMALL, dtype="bfloat16"))
    shared, own, alone, exact = (gap["mean"] for gap in found.values())
    assert exact < 1e-5 < alone
    assert own < 2 * alone  # sharing adds nothing of its own
    assert shared < own + alone + 1e-6
