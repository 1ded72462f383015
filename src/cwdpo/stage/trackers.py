"""Experiment trackers: a run of cwdpo is one run of each tracker, on one axis of steps, also after a resume.

The trackers are accelerate's; what each of them can show beside numbers is in :mod:`cwdpo.stage.tracker_kinds`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cwdpo.config import Recipe
from cwdpo.errors import RecipeError
from cwdpo.rundir import RunDir
from cwdpo.stage.tracker_kinds import KINDS, Result, Tracked, as_parameters
from cwdpo.waiting import from_first

FILE = "trackers.json"
"""In the run folder: the id of the run, and the ids that trackers gave it."""


class Trackers:
    """The trackers of a run; by default there are none.

    A step counts from the start of the run: stage 2 begins where the rows of stage 1 end. A resumed run does not send
    the rows again that the run folder had at its start, except to trackers that may have lost the last ones.

    Args:
        run: the run folder; needed if there are trackers.
        started: the trackers, started.
        note: called with a text when a tracker fails; the run goes on without it.
    """

    def __init__(
        self,
        run: RunDir | None = None,
        started: Sequence[Tracked] = (),
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._run, self._note = run, note
        self._started = list(started)
        self._sent = _last_steps(run)
        self._offsets = {"stage1": 0}

    def __bool__(self) -> bool:
        return bool(self._started)

    def numbers(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row, the key ``loss`` as ``stage1/loss``; other values are left out."""
        if not self:
            return
        values = {
            f"{stage}/{key}": value
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step"
        }
        at, again = self._offset(stage) + step, step <= self._sent.get(stage, -1)
        self._each(lambda tracked: None if again and tracked.keeps else tracked.tracker.log(values, step=at))

    def parameters(self, values: Mapping[str, Any], *, again: bool = False) -> None:
        """Send parameters of the run, by dotted names; lists and mappings become JSON.

        Args:
            values: by name.
            again: whether an earlier start of the run has sent them.
        """
        plain = as_parameters(values)
        self._each(lambda tracked: None if again and tracked.keeps else tracked.parameters(plain))

    def result(self, result: Result) -> None:
        """Send what a reader of the finished run wants to see."""
        last = [self._offset(stage) + step for stage, step in _last_steps(self._run).items()]
        self._each(lambda tracked: tracked.show(result, max(last, default=0)))

    def finish(self, error: BaseException | None = None) -> None:
        """End the run in every tracker, as failed if there was an error."""
        self._each(lambda tracked: tracked.finish(error))
        self._started.clear()

    def _offset(self, stage: str) -> int:
        """Number of steps before the stage. Stage 1 is complete when stage 2 has a row."""
        if stage not in self._offsets:
            self._offsets[stage] = _last_steps(self._run).get("stage1", 0)
        return self._offsets[stage]

    def _each(self, send: Callable[[Tracked], object]) -> None:
        for tracked in list(self._started):
            try:
                send(tracked)
            except Exception as error:  # a tracker or its server fails in ways of its own
                self._started.remove(tracked)
                self._note(f"the tracker {tracked.name} failed and gets nothing more: {_said(error)}")


@contextmanager
def started_trackers(recipe: Recipe, run: RunDir, note: Callable[[str], None]) -> Iterator[Trackers]:
    """The trackers of ``train.report_to``; they are started here and finished at the end.

    The first start of a run gives it an id, which the run folder keeps; a resumed run continues under it.

    Raises:
        RecipeError: a tracker does not start, for instance because nobody is logged in.
    """
    trackers = Trackers()
    trouble: list[RecipeError | None] = [None]
    if run.writes and recipe.train.report_to:
        try:
            trackers = _opened(recipe, run, note)
        except RecipeError as error:
            trouble = [error]
    # Every process raises the error; else the others would wait for the one that writes without end.
    found = from_first(trouble[0], "starting trackers") if recipe.train.report_to else None
    if found is not None:
        raise found
    try:
        yield trackers
    except BaseException as error:
        trackers.finish(error)
        raise
    trackers.finish()


def _opened(recipe: Recipe, run: RunDir, note: Callable[[str], None]) -> Trackers:
    known = run.json(FILE)
    ids = {"id": uuid.uuid4().hex[:8], **known}
    started = [_start(name, recipe, run, ids) for name in recipe.train.report_to]
    run.write_json(FILE, ids | {t.name: t.given_id for t in started if t.given_id is not None})
    trackers = Trackers(run, started, note)
    trackers.parameters(recipe.flat(), again=bool(known))
    return trackers


def _start(name: str, recipe: Recipe, run: RunDir, ids: Mapping[str, str]) -> Tracked:
    kind, train = KINDS.get(name, Tracked), recipe.train
    try:
        return kind.start(
            name, run=run.path, ids=ids, project=train.project, settings=train.trackers.get(name, {})
        )
    except Exception as error:
        raise RecipeError(f"train.report_to: the tracker {name} does not start: {_said(error)}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _last_steps(run: RunDir | None) -> dict[str, int]:
    """The last step of each stage that the run folder has rows of."""
    last: dict[str, int] = {}
    for row in (*run.metrics(), *run.readings()) if run else ():
        stage = str(row.get("stage"))
        last[stage] = max(last.get(stage, 0), int(row.get("step", 0)))
    return last
