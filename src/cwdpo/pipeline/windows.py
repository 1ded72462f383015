"""A stage with ``data.streaming``: one Trainer for all windows, with new training data in each.

A window is an epoch over a data set of fixed length, as a round is (:mod:`cwdpo.onpolicy.rounds`): at its start the
next rows are read, encoded and scored by the reference, and the data loader reads its first batch afterwards.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import astuple
from typing import Any

from transformers import TrainerCallback

from cwdpo.clock import spent_on
from cwdpo.data.contents import forget_contents
from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.problems import printable
from cwdpo.data.read.stream import OTHER_ROWS, Place
from cwdpo.errors import DataError, FileError
from cwdpo.models.vision_cache import drop_vision_features
from cwdpo.onpolicy.rounds import RoundData
from cwdpo.pipeline.inputs import of_rows
from cwdpo.stage.prepare import encode, keep_negatives, with_reference_values
from cwdpo.stage.reference import FOLDER as REFERENCE
from cwdpo.stage.stage import Stage
from cwdpo.stage.streaming import FILE, StageWindow
from cwdpo.trainer.weights import Weights
from cwdpo.waiting import from_first


class Windows(TrainerCallback):  # type: ignore[misc]
    """Prepares each window when it starts; on resume, prepares the current window again.

    Args:
        stage: the stage, before training; its examples are the first window.
        rows: these, as they are trained on.

    Attributes:
        data: the training data of the trainer.
    """

    def __init__(self, stage: Stage, rows: EncodedRows) -> None:
        assert stage.stream is not None
        self.stage, self.stream = stage, stage.stream
        self._per_window = self.stream.size // stage.prompts_per_step
        self.data = RoundData(self.stream.size)
        self._first, self._begun = rows, False
        written = stage.run.rows(FILE) if stage.resume else []
        written = from_first(written, "reading the windows")
        self._known = {row["window"]: row for row in written if row["stage"] == stage.name}
        # Needed for the first window, too: on resume the policy is no longer the reference.
        self._start = Weights.of(stage.policy.model) if stage.objective.needs_reference else None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prepare the window of this epoch."""
        self.begin(state.global_step // self._per_window)

    def begin(self, number: int) -> None:
        """Read a window and put its rows into :attr:`data`.

        Raises:
            DataError: the rows cannot be used, or are not those that this run has read before.
        """
        self.data.fill(())  # what it holds is let go of before more is read
        window, before = self._read(number)
        if window is self.stream.first:
            rows, contents = self._first, None  # inputs.json has its digests
        else:
            examples = self.stream.with_negatives(window)
            contents = of_rows(examples)
            known = self._known.get(number, {}).get("contents")
            if known is not None and known != contents:
                raise DataError(
                    f"{window.span}, or their images, are not those of window {number} when this run trained on it: "
                    f"{OTHER_ROWS}"
                )
            encoded = encode(self.stage, examples, f"/window{number}")
            rows = self._scored(encoded)
        self._begun = True
        self.data.fill(rows)
        self._record(number, window, before, contents, len(rows))

    def _read(self, number: int) -> tuple[StageWindow, tuple[int, int]]:
        """A window, and the rows and bad rows before it."""
        if number == 0:
            return self.stream.first, (0, 0)
        last = self._known.get(number - 1)
        if last is None:
            raise FileError(
                f"{self.stage.run.path / FILE}: has no window {number - 1} of {self.stage.name}: restore it from a "
                "copy, or start a new run in another --out"
            )
        begin = [Place(*place) for place in last["end"]]
        self.stage.listener.phase(f"{self.stage.name}: window {number}, from row {begin[0].row + 1}")
        forget_contents()
        self.stage.encoder.forget()
        drop_vision_features(self.stage.policy.model)
        before = last["rows_read"], last["bad_rows"]
        with spent_on("data"):
            known = [self._digests(i, place.turn) for i, place in enumerate(begin)]
            window = self.stream.read(begin, known=known, before=before)
        step = (number + 1) * self._per_window
        for part in window.parts:
            if part.end.turn > part.begin.turn == 0:
                self.stage.listener.note(
                    f"{part.name}: {self.stage.name}: all rows were read before step {step}: it goes on with the first "
                    "ones, in another order"
                )
        return window, before

    def _digests(self, source: int, turn: int) -> dict[int, str]:
        """Of a source, digests of the rows before windows of a turn, by row."""
        rows = ((row["begin"][source], row["digest"]) for row in self._known.values())
        return {begin[1]: digest[source] for begin, digest in rows if digest and begin[0] == turn}

    def _scored(self, encoded: EncodedRows) -> EncodedRows:
        """The rows with reference values: of the policy with the weights of the stage's start."""
        stage = self.stage
        folder = stage.run.path / REFERENCE / "window"
        if stage.run.writes and self._begun:  # of the window before; those of a killed run are used
            shutil.rmtree(folder, ignore_errors=True)
        model = stage.reference_model or stage.current_model()
        start = contextlib.nullcontext() if self._start is None else self._start.in_force(model)
        with start:
            rows = with_reference_values(stage, encoded, model, folder)
        return keep_negatives(stage.objective, rows)

    def _record(
        self,
        number: int,
        window: StageWindow,
        before: tuple[int, int],
        contents: dict[str, Any] | None,
        usable: int,
    ) -> None:
        """Write the window's row, unless a killed run has."""
        stage = self.stage
        row = {
            "stage": stage.name, "window": number, "step": number * self._per_window,
            "begin": [astuple(part.begin) for part in window.parts],
            "end": [astuple(part.end) for part in window.parts],
            "rows_read": before[0] + window.rows, "bad_rows": before[1] + window.bad_rows,
            "examples": len(window.examples), "filled_up": max(len(self.data) - usable, 0),
            "digest": [part.digest for part in window.parts], "contents": contents,
        }  # fmt: skip
        if number not in self._known:
            stage.run.append(FILE, [row])
            texts = [
                {"stage": f"{stage.name}/window{number}/read", "problem": printable(str(p))}
                for p in window.problems
            ]
            if number and texts:
                stage.run.append("problems.jsonl", texts)
        self._known[number] = row
