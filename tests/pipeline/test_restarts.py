"""A launcher restarts a run of which one process was killed; it ends where the undisturbed run ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos.commands import RECIPE, contents, difference
from paths import TESTS

KILLS = int(os.environ.get("CWDPO_RESTARTS", "1"))
"""Killed runs of each kind, at instants spread over the run, of the first and the second process in turn."""
INSTANTS = (
    "recipe.yaml", "init", "inputs.json", "encoded/stage1.arrow", "stage1", "readings.jsonl", "metrics.jsonl",
    "stage1/.checkpoint-4.*.tmp", "stage1/checkpoint-4", "stage1/model", "calibration.json", "pool.jsonl",
    "reference", "rounds.jsonl", "stage2/.checkpoint-2.*.tmp", "stage2/checkpoint-4", "stage2/checkpoint-6",
    "model", "samples.jsonl", "summary.json",
)  # fmt: skip
"""Names that appear in a run folder one after the other, in all phases of a run."""
KINDS = [("ddp", "full"), ("fsdp2", "lora"), ("fsdp2", "full")]
WHEN = re.compile(r"/\.metadata$")
"""torch stores the time in the description of a sharded checkpoint."""


def launched(kind: tuple[str, str], recipe: Path, out: Path) -> subprocess.Popen[str]:
    mode, tune = kind
    program = (
        ["-m", "cwdpo"] if mode == "ddp" else [str(TESTS / "process_worker.py"), mode, "-", "-", "-", "cwdpo"]
    )
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "3",
        *program, "train", str(recipe), "--out", str(out), "--auto-resume", f"model.tune={tune}",
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


def kill_when(out: Path, begun: str, rank: int, launcher: subprocess.Popen[str]) -> None:
    """Kill one process as soon as a name is in the run folder."""
    until = time.monotonic() + 300
    while not any(out.glob(begun)):
        assert launcher.poll() is None, "the run ended before"
        assert time.monotonic() < until, f"{begun} did not appear"
        time.sleep(0.01)
    pid = process_of(rank, launcher.pid)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def ended(launcher: subprocess.Popen[str], out: Path) -> dict[str, bytes]:
    """What a run left that must not differ."""
    try:
        assert launcher.wait(600) == 0, out.with_suffix(".log").read_text()[-3000:]
    finally:
        launcher.terminate()  # it ends its processes
        launcher.wait()
    return {name: data for name, data in contents(out).items() if not WHEN.search(name)}


@pytest.mark.slow
# The whole sharded model by hand: that it resumes, tests/pipeline/test_processes.py shows every time.
@pytest.mark.parametrize("kind", KINDS[: None if "CWDPO_RESTARTS" in os.environ else 2], ids="-".join)
def test_a_killed_process_is_restarted_and_the_run_ends_as_undisturbed(kind, tmp_path: Path) -> None:
    recipe, twin = tmp_path / "recipe.yaml", tmp_path / "twin"
    recipe.write_text(RECIPE)
    wanted = ended(launched(kind, recipe, twin), twin)
    first = KINDS.index(kind) % 2  # the two sharded kinds are killed at other instants
    for number in range(KILLS):
        rank, begun = (
            number % 2,
            INSTANTS[(first + (2 * number + 1) * len(INSTANTS) // (2 * KILLS)) % len(INSTANTS)],
        )
        out = tmp_path / f"{number}-{rank}"
        launcher = launched(kind, recipe, out)
        try:
            kill_when(out, begun, rank, launcher)
        except BaseException:
            launcher.terminate()
            raise
        assert not difference(ended(launcher, out), wanted), (rank, begun)
        assert "(exitcode: -9)" in out.with_suffix(".log").read_text(), "the launcher missed it"
        print(f"{kind}: process {rank} killed at {begun}", flush=True)


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
