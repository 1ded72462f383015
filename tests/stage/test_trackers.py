"""Trackers by a stand-in for one of accelerate's: the axis of steps, resumes, failures. Real ones: tests/trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from cwdpo.config import load_recipe
from cwdpo.errors import MissingPackageError, RecipeError
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.rundir import RunDir
from cwdpo.stage import tracker_kinds
from cwdpo.stage.listener import Listener
from cwdpo.stage.tracker_kinds import Result, Tracked, as_parameters

NAME = "swanlab"


class Store:
    """What the stand-in was told."""

    def __init__(self) -> None:
        self.started: list[tuple[str, dict[str, Any]]] = []
        self.parameters: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended: list[str] = []
        self.fails = ""

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in self.rows if name in values]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A tracker that keeps what it gets in memory, and fails where the store says so."""
    found = Store()

    class StandIn:
        name = NAME

        def __init__(self, project: str, **settings: Any) -> None:
            self.begun = project, settings

        def start(self) -> None:
            if found.fails == "start":
                raise ConnectionError("nobody is logged in")
            found.started.append(self.begun)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            found.parameters |= values

        def log(self, values: dict[str, float], step: int) -> None:
            if found.fails == "log":
                raise ConnectionError("the server is gone")
            found.rows.append((step, values))

    class Kind(Tracked):
        keeps = True

        def finish(self, error: BaseException | None) -> None:
            found.ended.append(type(error).__name__)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, NAME, StandIn)
    monkeypatch.setattr(tracker_kinds, "KINDS", {NAME: Kind})
    monkeypatch.setattr("cwdpo.stage.trackers.KINDS", {NAME: Kind})
    monkeypatch.setattr("cwdpo.pipeline.two_stage.check_trackers", lambda names: None)
    return found


def recipe(*more: str) -> Any:
    return load_recipe(
        "tiny",
        [
            f"train.report_to={NAME}", "stage1.steps=3", "stage2.steps=4", "train.logging_steps=1",
            "train.save_steps=2", "data.world.train=40", "data.world.validation=8", "calibration.samples=8",
            "evaluation.prompts=2", "probes.every=2", *more,
        ],
    )  # fmt: skip


class Killed(BaseException):
    """Stands in for a kill."""


def test_both_stages_are_one_line_and_a_resumed_run_sends_no_row_twice(store: Store, tmp_path: Path) -> None:
    def kill(stage: str, step: int, steps: int) -> None:
        if (stage, step) == ("stage2", 4):
            raise Killed

    settings = (f"train.trackers={{{NAME}: {{workspace: mine}}}}", "train.project=shapes")
    with pytest.raises(Killed):
        train_two_stage(recipe(*settings), tmp_path / "run", listener=Listener(step=kill))
    run = train_two_stage(recipe(*settings), tmp_path / "run", resume=True)
    assert store.started == [("shapes", {"workspace": "mine"})] * 2
    assert store.ended == ["Killed", "NoneType"]
    offsets = {"stage1": 0, "stage2": 3}
    for stage, offset in offsets.items():
        rows = [row for row in run.metrics() if row["stage"] == stage and "loss" in row]
        assert store.series(f"{stage}/loss") == [(row["step"] + offset, row["loss"]) for row in rows]
        readings = [r for r in run.readings() if (r["stage"], r["name"]) == (stage, "kl")]
        assert store.series(f"{stage}/probe/kl") == [(r["step"] + offset, r["value"]) for r in readings]
    assert [step for step, _ in store.series("stage2/loss")] == [4, 5, 6, 7]
    assert store.parameters["seed"] == 0
    assert store.parameters["stage2.objective.name"] == "cw_dpo"
    assert store.parameters["stage2.cooling/floor"] == pytest.approx(run.json("calibration.json")["floor"])
    assert store.series("evaluation/ended_share")[0][0] == 7
    assert not any("loss" in name for row in run.metrics() for name in row if name.startswith("stage"))


def test_a_tracker_that_fails_is_noted_and_training_goes_on(store: Store, tmp_path: Path) -> None:
    store.fails, notes = "log", []
    run = train_two_stage(recipe(), tmp_path / "run", listener=Listener(note=notes.append))
    told = [note for note in notes if "tracker" in note]
    assert told == [f"the tracker {NAME} failed and gets nothing more: the server is gone"]
    assert (run.path / "report.html").is_file()
    assert store.ended == []


def test_a_tracker_that_does_not_start_is_refused_before_data_is_read(store: Store, tmp_path: Path) -> None:
    store.fails, phases = "start", []
    with pytest.raises(RecipeError, match=f"the tracker {NAME} does not start: nobody is logged in"):
        train_two_stage(recipe(), tmp_path / "run", listener=Listener(phase=phases.append))
    assert phases == []
    store.fails = ""
    train_two_stage(recipe(), tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=f"pip install {NAME}"):
        train_two_stage(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_run_shows() -> None:
    samples = [
        {"id": "a", "prompt": "What?", "chosen": "a | b", "image": None,
         "responses": [{"temperature": 0.0, "text": "red"}, {"temperature": 1.0, "text": "blue"}]}
    ]  # fmt: skip
    result = Result(figures={}, samples=samples, findings=(), files=())
    assert result.rows() == (
        ["id", "prompt", "chosen", "0: temperature 0.0", "1: temperature 1.0"],
        [["a", "What?", "a | b", "red", "blue"]],
    )
    assert result.pictures() == []
    assert tracker_kinds._markdown(*result.rows()).splitlines()[2] == "| a | What? | a \\| b | red | blue |"
    assert as_parameters({"a": [1, 2], "b": None, "c": 0.5, "d": "x"}) == {
        "a": "[1, 2]",
        "b": "null",
        "c": 0.5,
        "d": "x",
    }


def test_a_folder_without_rows_has_no_steps(tmp_path: Path) -> None:
    from cwdpo.stage.trackers import Trackers

    trackers = Trackers(RunDir(tmp_path))
    assert not trackers
    trackers.numbers("stage1", 1, {"loss": 1.0})
