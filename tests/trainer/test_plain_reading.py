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

from cwdpo.trainer.plain_reading import PlainReader, load_parts, refuse_values

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
