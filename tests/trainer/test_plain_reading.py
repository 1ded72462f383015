"""A checkpoint of torch.distributed.checkpoint is read as torch reads it, and what it could run does not run."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from cwdpo.errors import FileError
from cwdpo.trainer.checkpoints import checkpoint_to_resume
from cwdpo.trainer.plain_reading import PlainReader, load_parts, refuse_pickles, refuse_values

pytestmark = pytest.mark.filterwarnings("ignore")
VALUES = {
    "w": torch.arange(6.0).reshape(2, 3),
    "h": torch.ones(2, dtype=torch.bfloat16),
    "lr": 0.5,
    "names": ["a"],
}


class Runs:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "it ran")


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    dcp.save(dict(VALUES), storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def empty() -> dict[str, Any]:
    return {"w": torch.zeros(2, 3), "h": torch.zeros(2, dtype=torch.bfloat16), "lr": 0.0, "names": []}


def test_it_reads_what_torch_reads(saved: Path) -> None:
    found, wanted = empty(), empty()
    load_parts(found, saved)
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(saved), planner=DefaultLoadPlanner(), no_dist=True)
    for values in (found, wanted):
        assert torch.equal(values["w"], VALUES["w"])
        assert torch.equal(values["h"], VALUES["h"])
        assert (values["lr"], values["names"]) == (0.5, ["a"])


def test_a_table_of_contents_that_runs_something_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "mark")))
    with pytest.raises(pickle.UnpicklingError, match=r"it names pathlib\.Path\.write_text|it names "):
        PlainReader(saved).read_metadata()
    assert not (tmp_path / "mark").exists()
    with pytest.raises(pickle.UnpicklingError, match="it names "):
        load_parts(empty(), saved)
    (saved / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(pickle.UnpicklingError, match="no table of contents, but dict"):
        PlainReader(saved).read_metadata()


class Asks:
    """What Python 3.11.0 to 3.11.3 write for the member of an enumeration, or of something else."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


def test_members_of_enumerations_are_read_as_every_python_writes_them(saved: Path) -> None:
    table, one = PlainReader(saved).read_metadata(), _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    table.planner_data = Asks(_MEM_FORMAT_ENCODING, one.name)
    (saved / ".metadata").write_bytes(pickle.dumps(table))
    assert PlainReader(saved).read_metadata().planner_data is one
    for kind, name in ((_MEM_FORMAT_ENCODING, "__class__"), (type(table), "__init__")):
        table.planner_data = Asks(kind, name)
        (saved / ".metadata").write_bytes(pickle.dumps(table))
        with pytest.raises(pickle.UnpicklingError, match="it calls getattr"):
            PlainReader(saved).read_metadata()


def test_a_value_that_runs_something_is_refused(tmp_path: Path) -> None:
    values = {"w": torch.zeros(2), "lr": Runs(tmp_path / "mark")}
    dcp.save(values, storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_parts({"w": torch.zeros(2), "lr": 0.0}, tmp_path / "saved")
    assert not (tmp_path / "mark").exists()


def test_values_beside_tensors_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"(lr|names) is no tensor"):
        refuse_values(saved)
    tensors = {name: VALUES[name] for name in ("w", "h")}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path / "model"), no_dist=True)
    refuse_values(tmp_path / "model")


def deepspeed_files(checkpoint: Path, value: Any) -> Path:
    """A checkpoint with one of DeepSpeed's files, which holds the value."""
    (checkpoint / "global_step2").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step2")
    file = checkpoint / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save(value, file)
    return file


def test_files_of_deepspeed_that_run_something_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "stage2"
    deepspeed_files(folder / "checkpoint-2", {"w": VALUES["w"], "mark": Runs(tmp_path / "mark")})
    with pytest.raises(FileError, match="what DeepSpeed wrote cannot be loaded") as refused:
        checkpoint_to_resume(folder)
    assert "as no checkpoint of DeepSpeed does" in str(refused.value)
    assert not (tmp_path / "mark").exists()


def test_what_deepspeed_would_read_elsewhere_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    deepspeed_files(checkpoint, {"w": VALUES["w"]})
    refuse_pickles(checkpoint)
    (checkpoint / "latest").write_text("../elsewhere/global_step2")
    with pytest.raises(pickle.UnpicklingError, match="not one of its folders"):
        refuse_pickles(checkpoint)


@pytest.mark.parametrize("protocol", [None, 4])
def test_files_of_deepspeed_that_are_no_zip_or_another_pickle_are_refused(tmp_path: Path, protocol) -> None:
    file = deepspeed_files(tmp_path, {})
    if protocol is None:
        file.write_bytes(pickle.dumps(Runs(tmp_path / "mark")))
    else:
        torch.save({"mark": Runs(tmp_path / "mark")}, file, pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="zero_pp_rank_0"):
        refuse_pickles(tmp_path)
