"""What trackers have of a run that was killed and resumed, and of a second run, read from their own stores."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cwdpo.rundir import RunDir

SETTINGS = (
    "train.report_to=[tensorboard,wandb,mlflow,trackio]", "train.project=shapes", "train.logging_steps=1",
    "train.save_steps=3", "stage1.steps=4", "stage2.steps=8", "data.world.train=60", "data.world.validation=16",
    "calibration.samples=10", "evaluation.prompts=3", "probes.every=4",
)  # fmt: skip
TRAIN = """
import os, signal, sys
from cwdpo.config import load_recipe
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.stage.listener import Listener

out, seed, killed, resume, *settings = sys.argv[1:]

def step(stage, step, steps):
    if stage == "stage2" and step == int(killed):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = load_recipe("tiny", [*settings, f"seed={seed}"])
train_two_stage(recipe, out, resume=resume == "resume", listener=Listener(step=step))
"""
STEPS = list(range(1, 13))


class Stores:
    """Where the trackers store, and the two run folders."""

    def __init__(self, place: Path) -> None:
        self.place, self.first, self.second = place, place / "first", place / "second"
        self.variables = {
            "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(place / "trackio"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
        }  # fmt: skip

    def train(self, out: Path, seed: int, killed: int = 0, resume: str = "start") -> int:
        """Train in a process of its own; its exit code."""
        return subprocess.run(
            [sys.executable, "-c", TRAIN, str(out), str(seed), str(killed), resume, *SETTINGS],
            env={**os.environ, **self.variables}, cwd=self.place, timeout=900,
        ).returncode  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """The first run is killed at step 5 of stage 2, behind the checkpoint of step 3, and resumed."""
    found = Stores(tmp_path_factory.mktemp("stores"))
    assert found.train(found.first, 0, killed=5) == -9
    assert found.train(found.first, 0, resume="resume") == 0
    assert found.train(found.second, 1) == 0
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.variables.items():
            patch.setenv(name, value)
        yield found


def losses(run: Path) -> dict[int, float]:
    """The losses of a run by its steps in trackers."""
    rows = [row for row in RunDir(run).metrics() if "loss" in row]
    return {row["step"] + (4 if row["stage"] == "stage2" else 0): row["loss"] for row in rows}


def assert_arrived(found: dict[int, float], run: Path) -> None:
    """What a tracker that sends in the background had not written at the kill is lost, if it lies before the checkpoint
    (step 7)."""
    assert set(STEPS) - set(found) <= ({6, 7} if run.name == "first" else set())
    assert found == pytest.approx({step: loss for step, loss in losses(run).items() if step in found})


def floor(run: Path) -> float:
    return float(RunDir(run).json("calibration.json")["floor"])


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of wandb's offline file: a header, then blocks of LevelDB's log format with parts of records."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a whole record, or its last part
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found
            record = b""


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow_has_one_run_of_each(stores: Stores) -> None:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("shapes")
    assert experiment is not None
    runs = {
        run.info.run_name.rsplit("-", 1)[0]: run for run in client.search_runs([experiment.experiment_id])
    }
    assert set(runs) == {"first", "second"}
    for name, run in runs.items():
        folder = stores.place / name
        assert run.info.status == "FINISHED"
        assert run.data.params["seed"] == ("0" if name == "first" else "1")
        assert float(run.data.params["stage2.cooling/floor"]) == pytest.approx(floor(folder), rel=1e-5)
        history = [
            (m.step, m.value)
            for stage in ("stage1", "stage2")
            for m in client.get_metric_history(run.info.run_id, f"{stage}/loss")
        ]
        assert history == list(losses(folder).items())
        probed = [m.step for m in client.get_metric_history(run.info.run_id, "stage2/probe/kl")]
        assert probed == [4, 8, 12]
        assert "Calibrated on 10 samples" in run.data.tags["findings"]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"report.html", "summary.json", "samples.jsonl", "README.md", "samples"} <= files
        assert len(client.list_artifacts(run.info.run_id, "samples")) == 3


@pytest.mark.parametrize("name", ["first", "second"])
def test_tensorboard_has_one_line_and_the_samples(stores: Stores, name: str) -> None:
    events = EventAccumulator(
        str(stores.place / name / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    found = [(e.step, e.value) for stage in ("stage1", "stage2") for e in events.Scalars(f"{stage}/loss")]
    assert found == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(stores.place / name).items()
    ]
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("samples/")]) == 3
    assert {"findings/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])
    (text,) = events.Tensors("samples/text_summary")
    assert RunDir(stores.place / name).samples()[0]["chosen"] in text.tensor_proto.string_val[0].decode()


def test_trackio_has_one_run_of_each(stores: Stores) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs("shapes")
    assert sorted(run.rsplit("-", 1)[0] for run in runs) == ["first", "second"]
    for run in runs:
        folder = stores.place / run.rsplit("-", 1)[0]
        rows = SQLiteStorage.get_logs("shapes", run)
        found = [(r["step"], r[key]) for r in rows for key in ("stage1/loss", "stage2/loss") if key in r]
        assert_arrived(dict(found), folder)
        assert len(found) <= len(STEPS) + run.startswith("first")  # the row between checkpoint and kill
        (shown,) = [row for row in rows if "samples" in row]
        assert {"findings", "pictures/0"} <= set(shown)
        config: Any = SQLiteStorage.get_run_config("shapes", run)
        assert config["seed"] == int(run.startswith("second"))


def test_wandb_continues_under_one_id(stores: Stores) -> None:
    for name in ("first", "second"):
        folder = stores.place / name
        parts = sorted((folder / "wandb").glob("offline-run-*"))
        assert len(parts) == (2 if name == "first" else 1)
        identity = RunDir(folder).json("trackers.json")["id"]
        assert {part.name.rsplit("-", 1)[1] for part in parts} == {identity}
        found: dict[int, float] = {}
        for part in parts:
            for record in wandb_records(next(part.glob("*.wandb"))):
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for key in ("stage1/loss", "stage2/loss"):
                    if key in row:
                        found[row["_step"]] = row[key]
        assert_arrived(found, folder)
        files = {file.name for file in (parts[-1] / "files").iterdir()}
        assert {"report.html", "summary.json", "samples.jsonl"} <= files
