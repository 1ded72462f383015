"""A launcher restarts a run of which one process was killed; it ends where the undisturbed run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos.commands import RECIPE, contents, difference

KILLS = int(os.environ.get("CWDPO_RESTARTS", "1"))
"""Kills of each process, at instants spread over the run."""
BEGINS = (
    "recipe.yaml",
    "metrics.jsonl",
    "stage1/checkpoint-4",
    "calibration.json",
    "stage2/checkpoint-4",
    "model",
)


def launched(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "3",
        "-m", "cwdpo", "train", str(recipe), "--out", str(out), "--auto-resume",
    ]  # fmt: skip
    # Without the last one, accelerate's processes on CPUs meet the addresses of the attempt before, and wait for ever.
    more = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **more},
        )


def process_of(rank: int, launcher: int) -> int | None:
    """The launcher's child with a rank; None while there is none."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            said = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in said:
            return int(child)
    return None


def kill_when(begun: Path, rank: int, launcher: subprocess.Popen[str]) -> None:
    """Kill one process as soon as a name is in the run folder."""
    until = time.monotonic() + 300
    while not begun.exists():
        assert launcher.poll() is None, "the run ended before"
        assert time.monotonic() < until, f"{begun} did not appear"
        time.sleep(0.01)
    pid = process_of(rank, launcher.pid)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_ends_as_undisturbed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert launched(recipe, tmp_path / "twin").wait(600) == 0, (tmp_path / "twin.log").read_text()[-3000:]
    wanted = contents(tmp_path / "twin")
    for number in range(2 * KILLS):
        rank, begun = number % 2, BEGINS[(2 + number + number // 2) % len(BEGINS)]
        out = tmp_path / f"{number}-{rank}"
        launcher = launched(recipe, out)
        kill_when(out / begun, rank, launcher)
        assert launcher.wait(600) == 0, out.with_suffix(".log").read_text()[-3000:]
        assert not difference(contents(out), wanted), (rank, begun)


@pytest.mark.slow
def test_auto_resume_starts_and_continues(run, tmp_path, monkeypatch) -> None:
    asked = [
        "train", "tiny", "--out", tmp_path / "run", "stage1.enabled=false", "stage2.steps=1", "data.world.train=12",
        "data.world.validation=4", "calibration.samples=4", "evaluation.prompts=0", "probes.every=5",
        "probes.prompts=2",
    ]  # fmt: skip
    assert (
        run(*asked, "--resume")
        .err.splitlines()[-1]
        .endswith("leave out --resume to start one, or correct --out")
    )
    assert run(*asked, "--auto-resume").code == 0
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert run(*asked, "--auto-resume").code == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    assert "already" in run(*asked).err
