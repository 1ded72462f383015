"""``make soak``: memory and open files of three commands that run long must not grow.

- ``train`` with 200 rounds of on-policy negatives,
- ``watch`` on that run as it grows, asked by eight clients twice a second,
- ``sweep`` of 50 cells, with its workers.

All three run at once, each in a process of its own; a part that ends begins anew until the time is up. Memory is
that of a command and all its workers (resident, shared pages counted once each). A page takes more memory the longer
the run is that it shows, so `watch` is compared where the watched runs are nearly finished.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.commands import RECIPE, STUDY

CLIENTS = 8
ROUNDS = 200
CELLS = 50
MOST_GROWTH = 0.05
"""Largest growth of memory from the second to the last quarter, as a share."""
EVERY = 2.0
"""Seconds between two looks."""


@dataclass
class Part:
    """A command that is watched, and what was seen: seconds, progress, bytes, open files."""

    name: str
    words: list[str]
    place: Path
    progress: Callable[[], int]
    seen: list[tuple[float, int, int, int]] = field(default_factory=list)
    cycle: Callable[[], int] | None = None
    """The number of the watched run if it is nearly finished, else 0."""
    cycles: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By this number: bytes and open files."""
    starts: int = 0
    done: int = 0
    trouble: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, or begin anew; what a start before has seen does not count together with this one's."""
        self.starts += 1
        self.seen.append((-1, 0, 0, 0))
        shutil.rmtree(self.place / "out", ignore_errors=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.place / "said").open("wb") as said, (self.place / "err").open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cwdpo", *self.words], stdout=said, stderr=err, stdin=subprocess.DEVNULL,
                env=env, cwd=self.place,
            )  # fmt: skip

    def look(self, begun: float) -> bool:
        """Note what it uses; whether it still runs."""
        assert self.process is not None
        if (code := self.process.poll()) is not None:
            if code:
                self.trouble = f"exit code {code}: {(self.place / 'err').read_text(errors='replace')[-500:]}"
            return False
        self.done = max(self.done, self.progress())
        used = usage(self.process.pid)
        self.seen.append((time.monotonic() - begun, self.progress(), *used))
        if self.cycle is not None and (number := self.cycle()):
            self.cycles.setdefault(number, []).append(used)
        return True

    def verdict(self) -> str:
        """Memory and files at the beginning and at the end of the longest start; ``GROWS`` where they grew."""
        if self.cycle is not None:
            return self._verdict_of_cycles()
        rows = max(self._starts(), key=len)
        if len(rows) < 16:
            return f"{self.name}: too short to tell ({len(rows)} looks)"
        quarter = len(rows) // 4
        second, last = rows[quarter : 2 * quarter], rows[-quarter:]
        # Children that live a moment are seen or not: the lowest quarter of the looks has none.
        before, after = (quantiles([r[2] for r in part])[0] for part in (second, last))
        files = [max(r[3] for r in part) for part in (second, last)]
        grows = after > before * (1 + MOST_GROWTH) or files[1] > files[0] + 2
        return (
            f"{self.name}: {self.done} {'GROWS' if grows else 'flat'}: {before / 2**20:.0f} -> {after / 2**20:.0f} "
            f"MiB, {files[0]} -> {files[1]} open files (second and last quarter of {rows[-1][0] - rows[0][0]:.0f} s, "
            f"{self.starts} starts)"
        )

    def _verdict_of_cycles(self) -> str:
        """The same, of the second and the last quarter of the watched runs that were seen nearly finished."""
        of_runs = [self.cycles[number] for number in sorted(self.cycles)]
        if len(of_runs) < 4:
            return f"{self.name}: too short to tell ({len(of_runs)} watched runs were nearly finished)"
        quarter = len(of_runs) // 4
        # By run: a page takes the more memory, the nearer its run is to its end, and a later look may be nearer.
        before, after = (
            [fmean(max(look[i] for look in looks) for looks in part) for i in range(2)]
            for part in (of_runs[quarter : 2 * quarter], of_runs[-quarter:])
        )
        grows = after[0] > before[0] * (1 + MOST_GROWTH) or after[1] > before[1] + 2
        return (
            f"{self.name}: {self.done} {'GROWS' if grows else 'flat'}: {before[0] / 2**20:.0f} -> "
            f"{after[0] / 2**20:.0f} MiB, {before[1]:.0f} -> {after[1]:.0f} open files (second and last quarter of "
            f"{len(of_runs)} watched runs, nearly finished)"
        )

    def _starts(self) -> list[list[tuple[float, int, int, int]]]:
        found: list[list[tuple[float, int, int, int]]] = [[]]
        for row in self.seen:
            if row[0] < 0:
                found.append([])
            else:
                found[-1].append(row)
        return found


def usage(pid: int) -> tuple[int, int]:
    """Resident bytes (each page shared by n processes counts 1/n), and open files, of a process and its children."""
    memory = files = 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        with suppress(OSError):
            place = Path(f"/proc/{one}")
            found = re.search(r"^Pss:\s+(\d+) kB", (place / "smaps_rollup").read_text(), re.MULTILINE)
            memory += int(found[1]) * 1024 if found else 0
            files += len(os.listdir(place / "fd"))
            for task in (place / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return memory, files


def lines(path: Path) -> int:
    """Rows of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def parts(place: Path) -> list[Part]:
    """The run, its page, the sweep."""
    for name in ("run", "watch", "sweep"):
        (place / name).mkdir()
    tree = yaml.safe_load(RECIPE)
    tree["stage2"]["steps"] = ROUNDS
    tree["negatives"]["rounds"] = ROUNDS
    tree["train"]["save_steps"] = 20
    tree["probes"]["every"] = 10
    (place / "run" / "recipe.yaml").write_text(yaml.safe_dump(tree))
    points = [float(f"{i}e-6") for i in range(1, CELLS - 1)]
    study = {
        **STUDY,
        "variants": {"cw_dpo": {**STUDY["variants"]["cw_dpo"], "grid": {"stage2.learning_rate": points}}},
    }  # type: ignore[index]
    (place / "sweep" / "study.yaml").write_text(yaml.safe_dump(study))
    out = place / "run" / "out"
    return [
        Part("rounds of on-policy negatives", ["train", "recipe.yaml", "--out", "out"], place / "run",
             lambda: lines(out / "rounds.jsonl")),
        Part("pages of watch", ["watch", str(out), "--port", "0", "--every", "1"], place / "watch", lambda: 0),
        Part("cells of a sweep", ["sweep", "--study", "study.yaml", "--finalists", "2", "--jobs", "1", "--out", "out"],
             place / "sweep", lambda: len(list((place / "sweep" / "out" / "cells").glob("cw_dpo-*/figures.json")))),
    ]  # fmt: skip


class Clients:
    """Clients that ask for a page again and again."""

    def __init__(self, page: Part) -> None:
        self.page, self.stop, self.answers, self.lock = page, threading.Event(), 0, threading.Lock()
        page.progress = lambda: self.answers
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        while not self.stop.wait(0.5):
            said = self.page.place / "said"
            found = re.search(
                r"http://\S+/(?=\s)", said.read_text(errors="replace") if said.is_file() else ""
            )
            if found is None:
                continue
            with (
                suppress(OSError),
                urllib.request.urlopen(found[0], timeout=60) as answer,
            ):  # 500 where the run is not there
                answer.read()
                with self.lock:
                    self.answers += 1


def main() -> None:
    """Run the parts until the time is up; exit code 1 where something grew or failed."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    asked = parser.parse_args()
    os.nice(10)
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    run, page, sweep = every = parts(place)
    clients = Clients(page)
    page.cycle = lambda: run.starts if run.progress() > 0.9 * ROUNDS else 0
    begun = time.monotonic()
    told = begun
    try:
        run.start()
        sweep.start()
        while time.monotonic() < begun + 60 * asked.minutes:
            time.sleep(EVERY)
            for part in (run, sweep):
                if not part.look(begun) and not part.trouble:
                    part.start()
            if page.process is None and (place / "run" / "out" / "readings.jsonl").is_file():
                page.start()
            if page.process is not None:
                page.look(begun)
            if time.monotonic() > told + 60:
                told = time.monotonic()
                print("; ".join(f"{p.name} {p.progress()} {p.seen[-1][2] >> 20} MiB {p.seen[-1][3]} files"
                                for p in every if p.seen), flush=True)  # fmt: skip
    finally:
        clients.stop.set()
        for part in every:
            if part.process is not None and part.process.poll() is None:
                part.process.send_signal(signal.SIGTERM)
                part.process.wait()
    verdicts = [f"{part.verdict()} {part.trouble}" for part in every]
    print(f"soak, {(time.monotonic() - begun) / 60:.1f} minutes:\n" + "\n".join(verdicts))
    shutil.rmtree(place, ignore_errors=True)
    sys.exit(1 if any("GROWS" in v or p.trouble for v, p in zip(verdicts, every, strict=True)) else 0)


if __name__ == "__main__":
    main()
