"""Writes and reads the files of a run folder. Does not import torch.

The files::

    recipe.yaml        the resolved recipe
    environment.json   versions, platform, command
    problems.jsonl     rows that were left out, and why
    notes.jsonl        notes on the data: columns that are not read, images that are converted
    calibration.json   floor and tau, and the mean_logps that they were computed from
    encoded/           the encoded rows of the stage in training, in Arrow
    reference/         log-probabilities of the reference model, written batch by batch
    pool.jsonl         samples of the policy by round (only with on-policy negatives)
    answers.jsonl      answers of a server
    rounds.jsonl       per round of stage 2: how many negatives were sampled, mixed in and dropped, and some pairs
    metrics.jsonl      one JSON object per logging step: stage, step, and the Trainer's metrics
    timings.jsonl      seconds by part of the run: a row per logging step, and the Trainer's run times
    readings.jsonl     one Reading per line: held-out probes
    probes-STAGE.jsonl the probe set: per prompt its responses by type, each with its provenance
    stopped-STAGE.json why a stage ended early, and the step whose checkpoint was restored
    samples.jsonl      held-out prompts with the final policy's responses
    summary.json       the final figures
    trackers.json      the run's id, and the ids that experiment trackers gave it
    stage1/, stage2/   checkpoints of each stage
    model/             the final model with its processor
    report.html
    .lock              locked by the process that works in the folder; contains its id
    .copy              only in a copy of the folder: where the run is (cwdpo.copies)
    recipe.1.yaml ...  older recipes, after accepted changes of the recipe

Names that begin with a dot and end in .tmp or .old are incomplete files; a resumed run removes them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from cwdpo.errors import FileError, RunDirError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import Running, difference
from cwdpo.files.reading import ends_whole, read_jsonl, read_object
from cwdpo.files.writing import clear_pieces, open_to_append, refuse_links, sync, write_json, write_text
from cwdpo.records import Reading
from cwdpo.versions import versions

try:
    import fcntl
except ImportError:  # Windows: a second start in the same folder is not detected
    fcntl = None  # type: ignore[assignment]

BEGUN = (
    "metrics.jsonl", "readings.jsonl", "reference", "pool.jsonl", "answers.jsonl", "windows.jsonl", "stage1",
    "stage2", "model", "summary.json",
)  # fmt: skip
"""Names that exist in a folder after training has begun."""
FOLDERS = ("data", "init", "encoded", "reference", "stage1", "stage2", "model")
RECORDED = (
    "metrics.jsonl", "readings.jsonl", "curriculum.jsonl", "rounds.jsonl", "pool.jsonl", "answers.jsonl",
    "windows.jsonl", "stopped-*.json", "inputs.json", "calibration*.json", "probes-*.jsonl", "samples.jsonl",
)  # fmt: skip
"""Files that a resumed run continues from: their checksums are stored."""
_MADE_AGAIN = ("samples.jsonl", "inputs.json")
"""Files of these that may be missing: a resumed run makes the same file again."""
_MADE_BY_STAGE = ("calibration.json", "probes-*.jsonl")
"""The same, as long as the stage that makes them is not finished."""
_SUFFIXES = {".json", ".jsonl", ".yaml", ".html", ".md", ".tmp", ".old"}
_REMEDIES = (
    ("calibration.json", "delete it, and --resume calibrates again"),
    ("probes-*.jsonl", "delete it, and --resume makes the probe set again"),
    ("samples.jsonl", "delete it, and --resume samples the responses again"),
    (CHECKSUMS, "delete it, and the files are used without a check"),
    ("inputs.json", "delete it, and data and base model are used without a check"),
    ("summary.json", "delete it, and --resume writes it again"),
    ("*.jsonl", "remove that line, or restore the file from a copy"),
    ("*", "restore it from a copy, or start a new run in another --out"),
)
_HOLDER = "process {} on {}"
"""What a lock file says."""
_PATIENCE = 5.0
"""Seconds that a lock of a process that has ended is waited for."""


class RunDir:
    """The folder of one run. Of several processes only one has ``writes`` set; the others do not write."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self._lock: IO[str] | None = None
        self._running: dict[str, Running] = {}

    def lock(self) -> None:
        """Lock the folder against another start until :meth:`unlock`, or until this process ends.

        Raises:
            RunDirError: another process has locked it (the message names it); or the folder's name is not UTF-8.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise RunDirError(
                f"{self.path}: the name contains bytes that are not UTF-8, so the tokenizer's files cannot be written "
                "there: choose another --out"
            ) from None
        self.path.mkdir(parents=True, exist_ok=True)
        self.refuse_links()
        file = open_to_append(
            self.path / ".lock"
        )  # not opened with "w": the other process's id must remain readable
        until = time.monotonic() + _PATIENCE
        while not _locked(file):
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            if time.monotonic() > until or not _ended_here(holder):
                file.close()
                raise RunDirError(
                    f"{self.path}: in use by {holder}: wait for it or stop it, or choose another --out"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(_HOLDER.format(os.getpid(), socket.gethostname()) + "\n")
        file.flush()
        self._lock = file

    def refuse_links(self) -> None:
        """Refuse a folder in which a file of the run is a link to another place.

        Raises:
            FileError: with the first such name.
        """
        refuse_links(
            self.path, lambda name: name in FOLDERS or Path(name).suffix in _SUFFIXES or name == ".lock"
        )

    def unlock(self) -> None:
        """Unlock the folder. The lock file is kept: if it were deleted, two starts could lock two different files."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def recover(self) -> None:
        """Clean up after a kill: remove incomplete files and incomplete last lines, restore renamed old folders."""
        for folder in (self.path, self.path / "stage1", self.path / "stage2"):
            clear_pieces(folder)
        for path in self.path.glob("*.jsonl"):
            self._keep_rows(path.name, lambda row: True)

    def create(self, *, resume: bool = False) -> RunDir:
        """Make the folder; an existing run is continued only with ``resume``.

        Raises:
            RunDirError: the folder already contains a run and ``resume`` is not set.
        """
        if not resume:
            self.refuse_begun()
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume and (self.path / "recipe.yaml").exists():
            shutil.rmtree(self.path / "init", ignore_errors=True)
            stale = (
                "calibration*.json", "problems.jsonl", "notes.jsonl", "probes-*.jsonl", "stopped-*.json",
                "inputs.json", "trackers.json", CHECKSUMS,
            )  # fmt: skip
            for leftover in [path for name in stale for path in self.path.glob(name)]:
                leftover.unlink(missing_ok=True)
        return self

    def refuse_begun(self) -> None:
        """Refuse a folder in which training has begun; a start that failed before that leaves nothing to keep.

        Raises:
            RunDirError: training has begun.
        """
        if any((self.path / name).exists() for name in BEGUN):
            raise RunDirError(
                f"{self.path} already contains a run: continue it with --resume, or choose another --out"
            )

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run for reading.

        Raises:
            RunDirError: there is no run in the folder.
            FileError: it contains a link, a pipe or a device.
        """
        run = cls(path)
        if run.path.is_dir():
            run.refuse_links()
        if not any((run.path / name).exists() for name in ("recipe.yaml", "summary.json")):
            raise RunDirError(f"{path}: no run here (neither recipe.yaml nor summary.json)")
        return run

    def write_environment(self) -> None:
        """Record versions, platform and command."""
        self.write_json(
            "environment.json",
            {
                "packages": versions(),
                "python": sys.version.split()[0],
                "platform": platform.platform(),
                "command": " ".join(sys.argv),
            },
        )

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run."""
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run, and update the checksums."""
        if self.writes:
            self.forget(name)
            write_text(self.path / name, text)
            self.record()

    def record(self) -> None:
        """Store the current checksums of the files that a resumed run continues from."""
        if not self.writes:
            return
        entries = {}
        for name in _recorded(self.path):
            path, running = self.path / name, self._running.get(name)
            if running is None or not name.endswith(".jsonl") or path.stat().st_size < running.size:
                running = self._running[name] = Running()
            if name.endswith(".jsonl") and path.stat().st_size > running.size:
                sync(path)  # rows that a power cut takes away must not be missed later
            entries[name] = running.entry(path)
        if entries != self.json(CHECKSUMS):
            write_json(self.path / CHECKSUMS, entries)

    def forget(self, name: str) -> None:
        """Remove a file's checksum before the file is rewritten: a kill in between must not look like damage."""
        self._running.pop(name, None)
        known = self.json(CHECKSUMS) if self.writes else {}
        if known.pop(name, None) is not None:
            write_json(self.path / CHECKSUMS, known)

    def changes(self) -> list[str]:
        """Problems of files that differ from their stored checksums; rows may have been appended.

        Raises:
            FileError: the file of checksums is damaged.
        """
        return [
            text
            for name, entry in self.json(CHECKSUMS).items()
            if not (self._made_again(name) and not (self.path / name).exists())
            and (text := difference(self.path, name, entry, grows=name.endswith(".jsonl")))
        ]

    def _made_again(self, name: str) -> bool:
        if not _matches(name, _MADE_BY_STAGE):
            return _matches(name, _MADE_AGAIN)
        ends = ("model", "stage1/model") if "stage1" in name else ("model",)
        return not any((self.path / end).exists() for end in ends)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSONL file of the run."""
        if not self.writes:
            return
        with open_to_append(self.path / name) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Sync all appended rows to disk, and update the checksums."""
        for path in self.path.glob("*.jsonl") if self.writes else ():
            if not _matches(path.name, RECORDED):  # record() syncs the others
                sync(path)
        self.record()

    def drop_after(self, stage: str, step: int) -> None:
        """Remove the rows that ``stage`` wrote after ``step``: a resumed run writes them again."""
        for name in ("metrics.jsonl", "readings.jsonl", "curriculum.jsonl"):
            self._keep_rows(name, lambda row: row.get("stage") != stage or row.get("step", 0) <= step)
        if self.writes and self.json(f"stopped-{stage}.json").get("step", -1) > step:
            self.forget(f"stopped-{stage}.json")
            (self.path / f"stopped-{stage}.json").unlink(missing_ok=True)

    def drop_stages(self, name: str, stages: Collection[str]) -> None:
        """Remove the rows of some stages from a JSONL file: a resumed run writes them again."""
        self._keep_rows(name, lambda row: row.get("stage") not in stages)

    def _keep_rows(self, name: str, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Rewrite a JSONL file with the rows to keep, if rows are removed or its last line is incomplete."""
        path = self.path / name
        if not self.writes or not path.is_file():
            return
        rows = self.rows(name)
        kept = [row for row in rows if keep(row)]
        if len(kept) != len(rows) or not ends_whole(path):
            self.forget(name)
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def append_readings(self, stage: str, readings: Iterable[Reading]) -> None:
        """Append held-out readings of a stage; numbers that are not finite are written as null."""
        rows: list[dict[str, Any]] = [{"stage": stage, **asdict(r)} for r in readings]
        for row in rows:
            for key in ("value", "low", "high"):
                if row[key] is not None and not math.isfinite(row[key]):
                    row[key] = None
        self.append("readings.jsonl", rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return self.rows("metrics.jsonl")

    def readings(self) -> list[dict[str, Any]]:
        """Rows of readings.jsonl: the stage and the fields of a Reading."""
        return self.rows("readings.jsonl")

    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        return self.rows("samples.jsonl")

    def rounds(self) -> list[dict[str, Any]]:
        """Rows of rounds.jsonl."""
        return self.rows("rounds.jsonl")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a JSONL file of the run; a missing file has no rows.

        Raises:
            FileError: the file is damaged; the message says what to do.
        """
        try:
            return read_jsonl(self.path / name)
        except FileError as error:
            raise FileError(f"{error}: {remedy(name)}") from None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; a missing file gives an empty mapping.

        Raises:
            FileError: the file is damaged; the message says what to do.
        """
        path = self.path / name
        try:
            return read_object(path) if path.is_file() else {}
        except FileError as error:
            raise FileError(f"{error}: {remedy(name)}") from None


def _locked(file: IO[str]) -> bool:
    """Lock an open file against other processes; ``False`` if another one has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ended_here(holder: str) -> bool:
    """Whether the process that a lock file names was one of this machine and has ended.

    A process that it was just starting has its open files until it begins its own program, and with them the lock.
    """
    words = holder.split()
    if (
        len(words) != 4
        or not words[1].isdecimal()
        or holder != _HOLDER.format(words[1], socket.gethostname())
    ):
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _recorded(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.json*") if _matches(p.name, RECORDED))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def remedy(name: str) -> str:
    """What to do about a damaged file of a run."""
    return next(text for pattern, text in _REMEDIES if fnmatch(name, pattern))
