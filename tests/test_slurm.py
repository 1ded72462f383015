"""The batch script starts, on every machine, a command that accelerate's launcher takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from paths import ROOT

STAND_INS = {
    "scontrol": 'printf "node7\\nnode8\\n"',
    # What srun does of it: the command once a machine.
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    "accelerate": 'printf "%s\\n" "$@" > "$SAID.$SLURM_NODEID"',
}


@pytest.mark.parametrize("config", [None, "configs/accelerate/ddp.yaml"])
def test_every_machine_starts_its_launcher(config: str | None, tmp_path: Path) -> None:
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "123",
        "SLURM_GPUS_ON_NODE": "4",
    }
    more = {"CONFIG": config} if config else {}
    subprocess.run(
        [
            "bash",
            str(ROOT / "configs/slurm/train.sbatch"),
            "my recipe.yaml",
            "runs/mine",
            "train.batch_size=4",
        ],
        env={
            **os.environ,
            **slurm,
            **more,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SAID": str(tmp_path / "said"),
        },
        check=True,
        timeout=60,
    )
    for rank in range(2):
        command = (tmp_path / f"said.{rank}").read_text().splitlines()
        assert command[0] == "launch"
        found = launch_command_parser().parse_args(command[1:])
        assert (found.machine_rank, found.num_machines, found.num_processes) == (rank, 2, 8)
        assert (found.main_process_ip, found.main_process_port) == ("node7", 20123)
        assert (ROOT / found.config_file).is_file()
        assert found.config_file == (config or "configs/accelerate/fsdp2.yaml")
        assert (found.module, found.training_script) == (True, "cwdpo")
        assert found.training_script_args == [
            "train", "my recipe.yaml", "--out", "runs/mine", "--auto-resume", "train.batch_size=4",
        ]  # fmt: skip
