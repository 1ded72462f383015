"""Seconds by part, with a clock that is set by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cwdpo.clock import Clock, running, spent_on
from cwdpo.pipeline.timings import StepTimes
from cwdpo.rundir import RunDir


class Hands:
    """The time."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def hands() -> Hands:
    return Hands()


def test_every_second_counts_once_for_the_innermost_part(hands: Hands) -> None:
    clock = Clock(hands)
    with running(clock):
        hands.at += 1
        with spent_on("step", "backward"):
            hands.at += 2
            with spent_on("forward"):
                hands.at += 4
                with spent_on("images"):
                    hands.at += 8
                hands.at += 16
            hands.at += 32
        with spent_on("images"):
            hands.at += 64
    assert clock.take() == {
        "other": 1, "step": 0, "step: backward": 34, "step: forward": 20, "step: images": 8, "images": 64
    }  # fmt: skip
    assert clock.elapsed == 127
    hands.at += 3
    assert clock.take() == {"other": 3}


def test_cpu_seconds_are_counted_beside_the_others(hands: Hands) -> None:
    cpu = Hands()
    clock = Clock(hands, cpu)
    with running(clock), spent_on("work"):
        hands.at += 10
        cpu.at += 3
    cpu.at += 1
    assert clock.take_both() == ({"other": 0, "work": 10}, {"other": 1, "work": 3})
    hands.at += 2
    assert clock.take_both() == ({"other": 2}, {"other": 0})


def test_a_part_ends_with_an_error_too(hands: Hands) -> None:
    clock = Clock(hands)

    @spent_on("work")
    def fails() -> None:
        hands.at += 5
        raise ValueError

    with running(clock):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^$"):
                fails()
    hands.at += 1
    assert clock.take() == {"other": 1, "work": 10}


def test_without_a_clock_nothing_is_counted(hands: Hands) -> None:
    clock = Clock(hands)
    with spent_on("work"):
        hands.at += 5
    assert clock.take() == {"other": 5}


@pytest.mark.parametrize(
    ("seconds", "images", "workers", "said"),
    [
        (60, 0.2, 0, "20% of their time: with train.dataloader_workers"),
        (60, 0.2, 3, "20% of their time: 3 data workers are too few"),
        (60, 0.05, 0, None),
        (20, 0.2, 0, None),
    ],
)
def test_steps_that_wait_for_images_are_named(
    hands: Hands, tmp_path: Any, seconds: float, images: float, workers: int, said: str | None
) -> None:
    notes: list[str] = []
    train = SimpleNamespace(dataloader_workers=workers)
    stage: Any = SimpleNamespace(
        name="stage2", run=RunDir(tmp_path), recipe=SimpleNamespace(train=train),
        listener=SimpleNamespace(note=notes.append),
    )  # fmt: skip
    times = StepTimes(stage)
    with running(Clock(hands)):
        hands.at += 1000  # before the steps
        for step in range(1, 11):
            with spent_on("step", "forward"):
                hands.at += seconds * (1 - images) / 10
                with spent_on("images"):
                    hands.at += seconds * images / 10
            times.store(step, 10)
        times.end()
    assert len(notes) == (said is not None)
    assert all(str(said) in note and note.startswith("stage2: the steps waited") for note in notes)
    rows = RunDir(tmp_path).rows("timings.jsonl")
    assert [row["remaining"] for row in rows] == [
        None if step == 1 else pytest.approx(seconds / 10 * (10 - step)) for step in range(1, 11)
    ]
    assert rows[0]["parts"]["other"] == 1000
    assert rows[-1]["elapsed"] == pytest.approx(1000 + seconds)
