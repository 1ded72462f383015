"""What a run writes and how it is read back. No torch is imported here.

A run folder explains itself::

    recipe.yaml        the resolved recipe
    environment.json   versions, platform, command
    problems.jsonl     rows that were left out, and why
    notes.jsonl        what else a reader should know of the data: columns that are not read, altered pictures
    calibration.json   floor and tau, and the mean_logps they came from
    reference/         log-likelihoods of the reference, as its pass goes on
    pool.jsonl         samples of the policy by round, as they are drawn (only with on-policy negatives)
    answers.jsonl      what a server answered
    rounds.jsonl       per round of stage 2: what was asked, blended and dropped, and some pairs
    metrics.jsonl      one JSON object per logging step: stage, step, and the Trainer's metrics
    timings.jsonl      one per start that ended a stage: its run time and speed, that start's steps only
    readings.jsonl     one Reading per line: held-out probes
    probes-STAGE.jsonl the probe set: per prompt its responses by type, each with its provenance
    stopped-STAGE.json why a stage ended early, and the step that it went back to
    samples.jsonl      held-out prompts with the captions that the final policy wrote
    summary.json       the final figures
    stage1/, stage2/   checkpoints of each stage
    model/             the final model with its processor
    report.html
    .lock              held by the process that works in the folder; names it
    recipe.1.yaml ...  what an accepted change of the recipe left behind

Names that begin with a dot and end in .tmp or .old are pieces of unfinished writing; a resumed run clears them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from cwdpo.errors import FileError, RunDirError
from cwdpo.files.checksums import FILE as CHECKSUMS
from cwdpo.files.checksums import Running, difference
from cwdpo.files.reading import ends_whole, read_jsonl, read_object
from cwdpo.files.writing import clear_pieces, open_to_append, refuse_links, sync, write_json, write_text
from cwdpo.records import Reading

try:
    import fcntl
except ImportError:  # Windows: two starts in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

BEGUN = (
    "metrics.jsonl", "readings.jsonl", "reference", "pool.jsonl", "answers.jsonl", "stage1", "stage2",
    "model", "summary.json",
)  # fmt: skip
"""What a folder holds once training has begun."""
FOLDERS = ("data", "init", "reference", "stage1", "stage2", "model")
RECORDED = (
    "metrics.jsonl", "readings.jsonl", "curriculum.jsonl", "rounds.jsonl", "pool.jsonl", "answers.jsonl",
    "stopped-*.json", "inputs.json", "calibration*.json", "probes-*.jsonl", "samples.jsonl",
)  # fmt: skip
"""Files that a resumed run goes on from: their checksums are kept."""
_MADE_AGAIN = ("calibration.json", "probes-*.jsonl", "samples.jsonl", "inputs.json")
"""Those of them that may be missing: what a resumed run makes again is the same."""
_SUFFIXES = {".json", ".jsonl", ".yaml", ".html", ".md", ".tmp", ".old"}
_REMEDIES = (
    ("calibration.json", "delete it, and --resume calibrates again"),
    ("probes-*.jsonl", "delete it, and --resume makes the probe set again"),
    ("samples.jsonl", "delete it, and --resume draws the samples again"),
    (CHECKSUMS, "delete it, and the files are taken as they are"),
    ("inputs.json", "delete it, and data and base model are taken as they are"),
    ("summary.json", "delete it, and --resume writes it again"),
    ("*.jsonl", "take that line out, or restore the file from a copy"),
    ("*", "restore it from a copy, or start a new run in another --out"),
)
PACKAGES = ("cwdpo", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunDir:
    """One run's folder. Of several processes only one has ``writes`` set; the others change nothing."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self._lock: IO[str] | None = None
        self._running: dict[str, Running] = {}

    def lock(self) -> None:
        """Hold the folder against another start until :meth:`unlock`, or until this process ends, in whatever way.

        Raises:
            RunDirError: another process holds it, which the message names; or the folder's name is not UTF-8.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise RunDirError(
                f"{self.path}: the name holds bytes that are not UTF-8, and the tokenizer's files cannot be written "
                "there: choose another --out"
            ) from None
        self.path.mkdir(parents=True, exist_ok=True)
        self.refuse_links()
        file = open_to_append(self.path / ".lock")  # the holder's name is not cut
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            file.close()
            raise RunDirError(
                f"{self.path}: in use by {holder}: wait for it or stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def refuse_links(self) -> None:
        """Refuse a folder in which a name of a run is a link: it would lead readers and writers outside.

        Raises:
            FileError: the first such name.
        """
        refuse_links(
            self.path, lambda name: name in FOLDERS or Path(name).suffix in _SUFFIXES or name == ".lock"
        )

    def unlock(self) -> None:
        """Let go of the folder. The file stays: to delete it would let two starts hold two files of one name."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def recover(self) -> None:
        """Clear what a kill left: pieces of unfinished writing, and cut last lines. A whole old folder returns."""
        for folder in (self.path, self.path / "stage1", self.path / "stage2"):
            clear_pieces(folder)
        for path in self.path.glob("*.jsonl"):
            self._keep_rows(path.name, lambda row: True)

    def create(self, *, resume: bool = False) -> RunDir:
        """Make the folder; an existing run is only continued when asked.

        Raises:
            RunDirError: the folder already holds a run and ``resume`` is not set.
        """
        # A start that ended before training (bad data, no model) has made nothing worth keeping.
        if any((self.path / name).exists() for name in BEGUN) and not resume:
            raise RunDirError(
                f"{self.path} already holds a run: continue it with --resume, or choose another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume and (self.path / "recipe.yaml").exists():
            shutil.rmtree(self.path / "init", ignore_errors=True)
            stale = (
                "calibration*.json", "problems.jsonl", "notes.jsonl", "probes-*.jsonl", "stopped-*.json",
                "inputs.json", CHECKSUMS,
            )  # fmt: skip
            for leftover in [path for name in stale for path in self.path.glob(name)]:
                leftover.unlink(missing_ok=True)
        return self

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run, to read.

        Raises:
            RunDirError: there is no run in the folder.
            FileError: it holds a link, a pipe or a device.
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
        """Write a text file of the run, and record it."""
        if self.writes:
            self.forget(name)
            write_text(self.path / name, text)
            self.record()

    def record(self) -> None:
        """Store the checksums of the files that a resumed run goes on from, as they are now."""
        if not self.writes:
            return
        entries = {}
        for name in _recorded(self.path):
            path, running = self.path / name, self._running.get(name)
            if running is None or not name.endswith(".jsonl") or path.stat().st_size < running.size:
                running = self._running[name] = Running()
            entries[name] = running.entry(path)
        if entries != self.json(CHECKSUMS):
            write_json(self.path / CHECKSUMS, entries)

    def forget(self, name: str) -> None:
        """Take a file out of the checksums before it is written anew: a kill in between must not look like damage."""
        self._running.pop(name, None)
        known = self.json(CHECKSUMS) if self.writes else {}
        if known.pop(name, None) is not None:
            write_json(self.path / CHECKSUMS, known)

    def changes(self) -> list[str]:
        """Files that are not as this run, or the one before it, recorded them; rows may have come since.

        Raises:
            FileError: the checksums themselves are damaged.
        """
        return [
            text
            for name, entry in self.json(CHECKSUMS).items()
            if not (_matches(name, _MADE_AGAIN) and not (self.path / name).exists())
            and (text := difference(self.path, name, entry, grows=name.endswith(".jsonl")))
        ]

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSONL file of the run."""
        if not self.writes:
            return
        with open_to_append(self.path / name) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Have every appended row on disk, and recorded."""
        for path in self.path.glob("*.jsonl") if self.writes else ():
            sync(path)
        self.record()

    def drop_after(self, stage: str, step: int) -> None:
        """Cut what ``stage`` wrote behind ``step``: a resumed run writes it again."""
        for name in ("metrics.jsonl", "readings.jsonl", "curriculum.jsonl"):
            self._keep_rows(name, lambda row: row.get("stage") != stage or row.get("step", 0) <= step)
        if self.writes and self.json(f"stopped-{stage}.json").get("step", -1) > step:
            self.forget(f"stopped-{stage}.json")
            (self.path / f"stopped-{stage}.json").unlink(missing_ok=True)

    def drop_stages(self, name: str, stages: Collection[str]) -> None:
        """Cut the rows of some stages out of a JSONL file: a resumed run writes them again."""
        self._keep_rows(name, lambda row: row.get("stage") not in stages)

    def _keep_rows(self, name: str, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Rewrite a JSONL file where rows go, or where its last line is cut."""
        path = self.path / name
        if not self.writes or not path.is_file():
            return
        rows = self.rows(name)
        kept = [row for row in rows if keep(row)]
        if len(kept) != len(rows) or not ends_whole(path):
            self.forget(name)
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def append_readings(self, stage: str, readings: Iterable[Reading]) -> None:
        """Append held-out readings of a stage; a number that is not finite is left out."""
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
        """Rows of readings.jsonl: stage plus the fields of a Reading."""
        return self.rows("readings.jsonl")

    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        return self.rows("samples.jsonl")

    def rounds(self) -> list[dict[str, Any]]:
        """Rows of rounds.jsonl."""
        return self.rows("rounds.jsonl")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a JSONL file of the run; an absent file has none.

        Raises:
            FileError: it is damaged; the message says what to do.
        """
        try:
            return read_jsonl(self.path / name)
        except FileError as error:
            raise FileError(f"{error}: {remedy(name)}") from None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; an absent file is an empty mapping.

        Raises:
            FileError: it is damaged; the message says what to do.
        """
        path = self.path / name
        try:
            return read_object(path) if path.is_file() else {}
        except FileError as error:
            raise FileError(f"{error}: {remedy(name)}") from None


def _recorded(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.json*") if _matches(p.name, RECORDED))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def remedy(name: str) -> str:
    """What to do about a damaged file of a run."""
    return next(text for pattern, text in _REMEDIES if fnmatch(name, pattern))
