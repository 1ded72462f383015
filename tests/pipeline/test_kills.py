"""Runs killed (SIGKILL) at various instants and resumed: all end where the uninterrupted run ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos.server import Server

RECIPE = """
name: killed
model:
  {path: init, device: cpu, init: {vision_width: 32, vision_layers: 1, width: 32, layers: 2, heads: 2, vocabulary: 400}}
data: {world: {seed: 5, train: 160, validation: 24, test: 0, negatives_per_prompt: 2}, stage1_fraction: 0.5}
stage1: {objective: sft_constrained, learning_rate: 1.0e-3, steps: 26}
stage2: {objective: {name: cw_dpo, beta: 0.3}, learning_rate: 1.0e-3, steps: 27}
# Checkpoints fall between two rows of the log, and both stages go over their data more than once.
train: {batch_size: 4, logging_steps: 3, save_steps: 4, warmup_steps: 2}
calibration: {samples: 48, max_new_tokens: 16}
probes: {every: 5, prompts: 12}
evaluation: {prompts: 12, samples: 4, max_new_tokens: 24, batch_size: 4}
stop: []
"""
ROUNDS = """
negatives: {on_policy_fraction: 0.5, rounds: 3, sampler: {samples: 2, max_new_tokens: 48, batch_size: 4}}
"""
QUANTIZED = RECIPE.replace("{path: init, ", "{path: init, tune: lora, quantization: nf4, ")
WORKERS = (
    RECIPE.replace("{path: init, ", "{path: init, vision_cache_gb: 0, ")
    .replace("stage1_fraction: 0.5}", "stage1_fraction: 0.5, cache_gb: 0}")
    .replace("train: {", "train: {dataloader_workers: 2, ")
)
"""Every picture is read by a worker whenever it is used."""
ATTEMPTS = 6


@dataclass(frozen=True)
class Instant:
    """A kill: the moment ``begins`` appears in the run folder, plus a share of the time until ``ends`` does."""

    name: str
    begins: str
    ends: str = ""
    earlier: int = 0
    """How many names that match ``begins`` are let by before."""


# What stands in the run folder when a phase begins, and when the next one does.
INSTANTS = [
    Instant("data and model", "recipe.yaml", "metrics.jsonl"),
    Instant("the first model's folder", ".init.*.tmp"),
    *[Instant("stage 1", "metrics.jsonl", "stage1/model")] * 3,
    Instant("a checkpoint of stage 1", "stage1/.checkpoint-*.tmp"),
    Instant("a checkpoint of stage 1", "stage1/.checkpoint-*.tmp/*/optimizer.pt", earlier=2),
    Instant("a checkpoint of stage 1", "stage1/.checkpoint-26.*.tmp/*/trainer_state.json"),
    Instant("stage 1's model", "stage1/.model.*.tmp"),
    *[Instant("reference pass", "reference", "calibration.json")] * 2,
    *[Instant("stage 2", "calibration.json", "model")] * 3,
    Instant("a checkpoint of stage 2", "stage2/.checkpoint-*.tmp/*/model.safetensors", earlier=1),
    Instant("a checkpoint of stage 2", "stage2/.checkpoint-27.*.tmp"),
    Instant("the final model", ".model.*.tmp"),
    *[Instant("evaluation", "model", "summary.json")] * 2,
    Instant("reporting", "summary.json"),
]
IN_ROUNDS = [
    *[Instant("sampling of the first round", "pool.jsonl", "rounds.jsonl")] * 3,
    *[Instant("the rounds", "rounds.jsonl", "model")] * 5,
]
QUANTIZED_ONES = [
    Instant("stage 1", "metrics.jsonl", "stage1/model"),
    Instant("reference pass", "reference", "calibration.json"),
    *[Instant("stage 2", "calibration.json", "model")] * 2,
    Instant("a checkpoint of stage 2", "stage2/.checkpoint-*.tmp/*/adapter_model.safetensors", earlier=1),
    Instant("evaluation", "model", "summary.json"),
]

WITH_WORKERS = [
    Instant("stage 1", "metrics.jsonl", "stage1/model"),
    Instant("reference pass", "reference", "calibration.json"),
    *[Instant("stage 2", "calibration.json", "model")] * 2,
    Instant("evaluation", "model", "summary.json"),
]


def start(server: Server, folder: Path, recipe: Path) -> None:
    again = ["--resume"] if folder.is_dir() else []
    server.start(folder.with_suffix(".err"), "train", recipe, "--out", folder, *again)


def kill(server: Server) -> bool:
    """Kill the run; false where it had ended by itself."""
    server.signal(signal.SIGKILL)
    return server.wait() == -signal.SIGKILL


def finish(server: Server, folder: Path) -> None:
    """Wait for the run's own end."""
    code = server.wait()
    said = folder.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
    assert code == 0, said[-3000:]


def seen(folder: Path, instant: Instant) -> Callable[[], bool]:
    """Whether the instant's name has appeared, for the wanted time."""
    names: set[Path] = set()

    def look() -> bool:
        with contextlib.suppress(FileNotFoundError):  # the run renames a folder while it is listed
            names.update(folder.glob(instant.begins))
        return len(names) > instant.earlier

    return look


def uninterrupted(server: Server, folder: Path, recipe: Path, instants: list[Instant]) -> dict[str, float]:
    """Run to the end; the seconds at which each name appeared."""
    names = {name for i in instants for name in (i.begins, i.ends) if name and "*" not in name}
    found: dict[str, float] = {}
    start(server, folder, recipe)

    def look() -> bool:
        for name in names - set(found):
            if (folder / name).exists():
                found[name] = time.monotonic()
        return False

    server.follow(look)
    finish(server, folder)
    return found


def killed_and_resumed(
    server: Server, folder: Path, recipe: Path, instant: Instant, draw: random.Random, times: dict[str, float]
) -> int:
    """Start, kill, resume; one run in three is killed once more. Returns the number of kills."""
    length = times[instant.ends] - times[instant.begins] if instant.ends else 0.004
    for attempt in range(ATTEMPTS):
        run = folder.with_name(f"{folder.name}-{attempt}")
        start(server, run, recipe)
        hit = server.follow(seen(run, instant))
        time.sleep(draw.uniform(0, length))
        if kill(server) and hit:
            break
    else:
        pytest.fail(f"{instant.name}: the run was always faster than the kill")
    run.rename(folder)
    kills = 1
    if draw.random() < 1 / 3:
        start(server, folder, recipe)
        server.follow(lambda: f"process {server.pid} " in (folder / ".lock").read_text())
        time.sleep(draw.uniform(0, 3))
        kills += kill(server)
    start(server, folder, recipe)
    finish(server, folder)
    return kills


def differences(run: Path, expected: Path) -> list[str]:
    """What two finished runs do not share, bit for bit; the time that things took is left out."""
    wrong = []
    for name in (
        "stage1/model/model.safetensors", "model/model.safetensors", "model/adapter_model.safetensors",
        "calibration.json", "metrics.jsonl",
        "readings.jsonl", "summary.json", "samples.jsonl", "problems.jsonl", "recipe.yaml",
        "stage1/checkpoint-26/model.safetensors", "stage2/checkpoint-27/model.safetensors", "pool.jsonl",
        "rounds.jsonl",
    ):  # fmt: skip
        if not (expected / name).exists():
            continue
        ours, theirs = ((folder / name).read_bytes() for folder in (run, expected))
        if ours.replace(os.fsencode(run), b"") != theirs.replace(os.fsencode(expected), b""):
            wrong.append(name)
    kept = sorted(p.relative_to(run).as_posix() for p in run.glob("stage?/*"))
    if kept != sorted(p.relative_to(expected).as_posix() for p in expected.glob("stage?/*")):
        wrong.append(f"stage folders hold {kept}")
    wrong += [f"left over: {p.name}" for p in run.rglob(".*") if p.name != ".lock"]
    if not (run / "report.html").is_file():
        wrong.append("report.html")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "instants"),
    [(RECIPE, INSTANTS), (RECIPE + ROUNDS, IN_ROUNDS), (QUANTIZED, QUANTIZED_ONES), (WORKERS, WITH_WORKERS)],
    ids=["once", "rounds", "nf4", "workers"],
)
def test_killed_runs_end_where_the_uninterrupted_run_ends(
    text: str, instants: list[Instant], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    expected = tmp_path / "uninterrupted"
    servers: queue.SimpleQueue[Server] = queue.SimpleQueue()
    both = [Server(), Server()]
    try:
        times = uninterrupted(both[0], expected, recipe, instants)
        with (expected / "metrics.jsonl").open() as rows:
            steps = [(r["stage"], r["step"]) for r in map(json.loads, rows)]
        assert len(steps) == len(set(steps)), "the uninterrupted run itself has doubles"
        assert {("stage1", 4), ("stage1", 26), ("stage2", 27)} <= set(steps)
        for server in both:
            servers.put(server)

        def one(number: int) -> tuple[int, list[str]]:
            folder, server = tmp_path / f"run{number:02}", servers.get()
            draw = random.Random(number)
            try:
                kills = killed_and_resumed(server, folder, recipe, instants[number], draw, times)
            finally:
                servers.put(server)
            return kills, differences(folder, expected)

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(one, range(len(instants))))
    finally:
        for server in both:
            server.close()
    lines = [
        f"{instant.name}: {kills} kill{'s' * (kills > 1)}, {'; '.join(wrong) or 'the same end'}"
        for instant, (kills, wrong) in zip(instants, found, strict=True)
    ]
    survived = sum(not wrong for _, wrong in found)
    with capsys.disabled():  # to stderr, which reaches the terminal from a worker of pytest-xdist too
        print("", *lines, f"kills survived: {survived}/{len(instants)}", sep="\n", file=sys.stderr)
    assert survived == len(instants), "\n".join(lines)
