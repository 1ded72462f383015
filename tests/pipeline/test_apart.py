"""Two processes with a disk each: the run is on the first one's, whole, and is resumed from there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chaos.commands import RECIPE, contents, difference
from launch import launch, together
from paths import TESTS

WORKER = """
import os, sys, threading, time, torch
from pathlib import Path
_, tests, mode, recipe, folder, until = sys.argv
sys.path.insert(0, tests)
from process_worker import shard_on_cpu
from cwdpo.pipeline.two_stage import train_two_stage
rank = os.environ["RANK"]
if mode == "fsdp2":
    shard_on_cpu()
def leave():
    while not (Path(folder) / "0" / "run" / until).exists():
        time.sleep(0.01)
    os._exit(9)
if until != "-" and rank == "1":
    threading.Thread(target=leave, daemon=True).start()
train_two_stage(recipe, Path(folder) / rank / "run", resume=True)
torch.distributed.destroy_process_group()
"""


def apart(
    mode: str, recipe: Path, folder: Path, until: str = "-", codes: tuple[int, int] = (0, 0)
) -> list[str]:
    """A run of two processes, each in a folder of its own; the second one may leave when a name is there."""
    command = [sys.executable, "-c", WORKER, str(TESTS), mode, str(recipe), str(folder), until]
    return together(command, codes=codes)


def without_metadata(run: Path) -> dict[str, bytes]:
    """A run's contents without the index of sharded checkpoints, which names their folder."""
    return {name: data for name, data in contents(run).items() if not name.endswith("/.metadata")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_run_without_a_shared_disk_is_the_run_with_one_and_resumes(mode: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    launch(tmp_path / "twin", recipe, 2, mode)
    first, second = tmp_path / "0" / "run", tmp_path / "1" / "run"
    apart(mode, recipe, tmp_path, "stage2/checkpoint-4", codes=(1, 9))
    checkpoint = first / "stage2" / "checkpoint-4"
    assert (checkpoint / "rng_state_1.pth").is_file()
    assert any(checkpoint.rglob("__1_*.distcp")) == (mode == "fsdp2")
    assert not list((second / "stage2").glob("checkpoint-*"))
    # Of its own it may have anything; it gets what the run has.
    (second / "stage1" / "checkpoint-4").mkdir(parents=True)
    (second / "calibration.json").write_text("{}")
    apart(mode, recipe, tmp_path)
    assert not difference(without_metadata(first), without_metadata(tmp_path / "twin"))
    assert (second / "stage2" / "checkpoint-4" / "rng_state_1.pth").read_bytes()
    assert not list(second.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_folder_that_is_no_copy_is_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    mine = tmp_path / "1" / "run" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("two years")
    for text in apart("ddp", recipe, tmp_path, codes=(1, 1)):
        assert "is no copy of the run in" in text
    assert mine.read_text() == "two years"
