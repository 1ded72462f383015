"""What a run writes and how it is read back. No torch is imported here.

A run folder explains itself::

    recipe.yaml        the resolved recipe
    environment.json   versions, platform, command
    problems.txt       rows that were left out, and why
    calibration.json   floor and tau, and the mean_logps they came from
    metrics.jsonl      one JSON object per logging step: stage, step, and the Trainer's metrics
    readings.jsonl     one Reading per line: held-out probes
    samples.jsonl      held-out prompts with the captions that the final policy wrote
    summary.json       the final figures
    stage1/, stage2/   checkpoints of each stage
    model/             the final model with its processor
    report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from cwdpo.errors import RunDirError
from cwdpo.records import Reading

PACKAGES = ("cwdpo", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name, sync, rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through :func:`write_text`; NaN is refused, because no other reader takes it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; a last line cut off by a kill is left out; no file is no rows.

    Raises:
        RunDirError: a line before the last is not JSON.
    """
    if not path.is_file():
        return []
    # Only a line feed ends a row: text of a model may hold every other line break.
    *whole, cut = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise RunDirError(f"{path}: line {number} is not JSON") from None
    with contextlib.suppress(ValueError):
        rows += [json.loads(cut)] if cut else []
    return rows


def ends_whole(path: Path) -> bool:
    """Whether a JSONL file is absent, empty, or ends in a line feed: then a row can be appended."""
    if not path.is_file() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class RunDir:
    """One run's folder. Of several processes only one has ``writes`` set; the others change nothing."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes

    def create(self, *, resume: bool = False) -> RunDir:
        """Make the folder; an existing run is only continued when asked.

        Raises:
            RunDirError: the folder already holds a run and ``resume`` is not set.
        """
        if (self.path / "recipe.yaml").exists() and not resume:
            raise RunDirError(
                f"{self.path} already holds a run: continue it with --resume, or choose another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run, to read.

        Raises:
            RunDirError: there is no run in the folder.
        """
        run = cls(path)
        if not any((run.path / name).exists() for name in ("recipe.yaml", "summary.json")):
            raise RunDirError(f"{path}: no run here (neither recipe.yaml nor summary.json)")
        return run

    def write_environment(self) -> None:
        """Record versions, platform and command."""
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
        self.write_json(
            "environment.json",
            {
                "packages": versions,
                "python": sys.version.split()[0],
                "platform": platform.platform(),
                "command": " ".join(sys.argv),
            },
        )

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run."""
        if self.writes:
            write_json(self.path / name, value)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSONL file of the run."""
        if not self.writes:
            return
        with (self.path / name).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def drop_after(self, stage: str, step: int) -> None:
        """Cut metrics and readings of ``stage`` behind ``step``: a resumed run writes them again."""
        if not self.writes:
            return
        for name in ("metrics.jsonl", "readings.jsonl"):
            rows = read_jsonl(self.path / name)
            kept = [r for r in rows if r.get("stage") != stage or r.get("step", 0) <= step]
            if len(kept) != len(rows) or not ends_whole(self.path / name):
                write_text(self.path / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))

    def append_readings(self, stage: str, readings: Iterable[Reading]) -> None:
        """Append held-out readings of a stage."""
        self.append("readings.jsonl", ({"stage": stage, **asdict(r)} for r in readings))

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return read_jsonl(self.path / "metrics.jsonl")

    def readings(self) -> list[dict[str, Any]]:
        """Rows of readings.jsonl: stage plus the fields of a Reading."""
        return read_jsonl(self.path / "readings.jsonl")

    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        return read_jsonl(self.path / "samples.jsonl")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; an absent file is an empty mapping."""
        path = self.path / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
