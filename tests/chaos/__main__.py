"""``make chaos``: kills every command at random instants, damages run folders file by file, mutates every input.

Everything follows from the seed: a case that fails is repeated by ``--only NAME`` with the same seed. What must hold:

- a killed command, started again, ends where its uninterrupted twin ended, byte for byte;
- a damaged run folder is refused in one line, or the run goes on and ends where the twin ended;
- a command with too little disk, memory or files says so in one line, and ends like its twin once there is enough;
- no input makes a reader raise anything but an error of cwdpo, or go on for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.error import URLError

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.commands import Command, commands, contents, difference, said
from chaos.mutate import WHOLE_FILE, mutate
from chaos.server import Server
from chaos.shortages import Shortages

SIGNALS = ("KILL", "TERM", "INT", "INT twice", "STOP and CONT")
CHECKPOINT = re.compile(r"^stage[12]/checkpoint-")
SECONDS_PER_INPUT = 10
OF_LIBC = "cannot allocate memory for thread-local data: ABORT"
"""With this line glibc ends a process itself (exit code 127) when a new thread finds no memory."""
MAIN = ("kills", "damaged files", "mutated inputs", "shortages", "wrong continuations", "tracebacks", "hangs")


@dataclass
class Figures:
    """What was tried, and what did not hold."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, *names: str) -> None:
        """One more of each."""
        self.counts.update(names)

    def fail(self, kind: str, case: str, said: str) -> None:
        """Note a case that did not hold, and show it."""
        self.counts[kind] += 1
        self.wrong.append(f"{kind}: {case}: {said[-1500:]}")
        print(f"{kind.upper()} {case}\n{said[-1500:]}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """The main figures on one line."""
        return ", ".join(f"{self.counts[name]} {name}" for name in MAIN)

    def table(self) -> str:
        """The figures as text."""
        return "\n".join(f"{n:>8}  {name}" for name, n in sorted(self.counts.items()))


class Chaos:
    """One harness: a folder to work in, a server, the undisturbed twins."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed, self.figures = place, seed, Figures()
        self.commands = commands(place)
        self.stages: dict[str, list[Path]] = {}
        self.server: Server
        self.memory = 0

    def prepare(self, *names: str) -> None:
        """Run every command, or those, once undisturbed; keep runs as they stood in the middle, too."""
        self.commands = [c for c in self.commands if not names or c.name in names]
        self.server = Server(limit=300.0, studies=self.place / "studies")
        status = Path(f"/proc/{self.server.process.pid}/statm").read_text(encoding="ascii")
        self.memory = int(status.split()[0]) * os.sysconf("SC_PAGE_SIZE")
        for command in self.commands:
            place, err = self.place / f"twin-{command.name}", self.place / f"twin-{command.name}.err"
            place.mkdir()
            for number, words in enumerate(command.first):
                self._must(self.server.run(err, *words), (0,), f"{command.name}, first {number}", err)
            begun = time.monotonic()
            self._start(command, place, err)
            if command.middles:
                self._keep_middles(command, place)
            elif command.end:
                command.end(self.server, place)
            self._must(self.server.wait(), command.codes, command.name, err)
            command.seconds = time.monotonic() - begun
            command.wanted = command.result(place)
            print(f"chaos: {command.name} takes {command.seconds:.1f} s undisturbed", flush=True)

    @staticmethod
    def _must(code: int, codes: tuple[int, ...], name: str, err: Path) -> None:
        if code not in codes:
            sys.exit(f"chaos: the undisturbed {name} ends with {code}:\n{err.read_text()[-3000:]}")

    def _keep_middles(self, command: Command, place: Path) -> None:
        found = [place / "run"]
        for number, name in enumerate(command.middles):
            if self.server.follow((place / "run" / name).is_dir):
                self.server.signal(signal.SIGSTOP)
                found.append(self.place / f"middle-{command.name}-{number}")
                shutil.copytree(place / "run", found[-1])
                self.server.signal(signal.SIGCONT)
        self.stages[command.name] = found

    def _draw(self, case: str, among: Sequence[Command]) -> tuple[Random, Command, Path, Path]:
        """What is drawn for a case, one of the commands, and an empty folder and error file for it."""
        rng = Random(f"{self.seed} {case}")
        command = rng.choices(among, [c.weight for c in among])[0]
        place, err = self.place / "case", self.place / "case.err"
        _clear(place, err, said(place))
        place.mkdir()
        return rng, command, place, err

    def _start(self, command: Command, place: Path, err: Path, **options: Any) -> None:
        said(place).unlink(missing_ok=True)
        self.server.start(err, *command.arguments(place), out=said(place), **options)

    # --- kills ------------------------------------------------------------------------------------------

    def kill(self, number: int) -> None:
        """One command, disturbed once or twice at random instants, and started again until it ends."""
        case = f"kill:{number}"
        rng, command, place, err = self._draw(case, self.commands)
        told = f"{case} ({command.name}"
        for _ in range(rng.choice((1, 1, 2))):
            how, instant = rng.choice(SIGNALS), rng.uniform(0, command.seconds)
            told += f", {how} after {instant:.2f} s"
            if self._disturbed(command, place, err, how, instant):
                self.figures.count("kills", f"kills: {how}", f"kills of {command.name}")
        told += ")"
        self._ends_like_its_twin(command, place, err, told)

    def _disturbed(self, command: Command, place: Path, err: Path, how: str, instant: float) -> bool:
        """Start and disturb; whether the command was still running then."""
        until = time.monotonic() + instant
        if self.has_ended(command, place):
            return False
        self._start(command, place, err)
        if not self.server.follow(lambda: time.monotonic() >= until):
            self.server.wait()
            return False
        hit = self.server.signal(getattr(signal, f"SIG{how.split()[0]}"))
        if how == "INT twice":
            time.sleep(0.05)
            self.server.signal(signal.SIGINT)
        if how == "STOP and CONT":
            time.sleep(0.3)
            self.server.signal(signal.SIGCONT)
            if command.end:
                command.end(self.server, place)
        self.server.wait()
        return hit

    @staticmethod
    def has_ended(command: Command, place: Path) -> bool:
        """Whether it had ended before, where a second start refuses to overwrite."""
        return bool(command.refuses) and (place / command.refuses).exists()

    def _ends_like_its_twin(self, command: Command, place: Path, err: Path, case: str) -> None:
        if _traceback(err):
            self.figures.fail("tracebacks", case, err.read_text(errors="replace"))
            err.unlink()
        code = command.codes[0]
        if not self.has_ended(command, place):
            self._start(command, place, err)
            if command.end:
                command.end(self.server, place)
            code = self.server.wait()
        text = err.read_text(errors="replace") if err.is_file() else ""
        if code not in command.codes or _traceback(err):
            self.figures.fail("wrong continuations", case, f"exit code {code}: {text}")
            return
        wrong = difference(command.result(place), command.wanted)
        if wrong:
            self._save(place)
            self.figures.fail("wrong continuations", case, f"differs from its twin: {wrong}")

    def _save(self, place: Path) -> None:
        """Keep the folder of a wrong continuation where it can be looked at."""
        kept = Path(tempfile.mkdtemp(prefix="chaos-wrong-"))
        shutil.copytree(place, kept / "case", symlinks=True)
        print(f"kept: {kept}", file=sys.stderr, flush=True)

    # --- shortages --------------------------------------------------------------------------------------

    def shortage(self, number: int) -> None:
        """One command with too little disk, too few files or too little memory; then again with enough."""
        case = f"shortage:{number}"
        rng, command, place, err = self._draw(case, [c for c in self.commands if not c.end])
        name, most = rng.choice(
            (
                ("RLIMIT_FSIZE", int(10 ** rng.uniform(3, 6.5))),
                ("RLIMIT_NOFILE", rng.randrange(12, 64)),
                ("RLIMIT_AS", self.memory + int(rng.uniform(0, 400) * 2**20)),
            )
        )
        told = f"{case} ({command.name}, {name} {most})"
        self._start(command, place, err, limits={name: most})
        code = self.server.wait()
        self.figures.count("shortages", f"shortages: {name[7:]}", f"shortages of {command.name}")
        text = err.read_text(errors="replace") if err.is_file() else ""
        said_why = "cwdpo: " in text or OF_LIBC in text
        if code not in command.codes and not _traceback(err) and not said_why and code > 0:
            self.figures.fail("tracebacks", told, f"exit code {code} without a word: {text}")
        self._ends_like_its_twin(command, place, err, told)

    # --- damage -----------------------------------------------------------------------------------------

    def damage(self, number: int) -> None:
        """One file of a run folder, stopped in the middle or finished, damaged; then the run is resumed and read."""
        case = f"damage:{number}"
        rng, command, place, err = self._draw(case, [c for c in self.commands if c.middles])
        source = rng.choice(self.stages[command.name])
        shutil.copytree(source, place / "run")
        files = sorted(p for p in (place / "run").rglob("*") if p.is_file() and p.name != ".lock")
        # Pictures of the world are many and alike.
        files = [p for p in files if p.suffix != ".png"] + [p for p in files if p.suffix == ".png"][:3]
        path, how = rng.choice(files), rng.choice(list(WHOLE_FILE))
        told = f"{case} ({command.name}, {source.name}, {path.relative_to(place / 'run')}, {how})"
        before = path.read_bytes()
        after = WHOLE_FILE[how](before, rng)
        if after == before:
            return
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)
        self.figures.count("damaged files", f"damaged files: {how}", f"damaged files of {command.name}")
        reader = rng.choice((None, None, "report", "diagnose", "export"))
        if reader is not None:
            self._read(reader, place, err, told)
        elif self.server.run(err, *command.arguments(place)):
            self._refused(err, told)
        else:
            self._went_on(command, path, place, err, told)

    def _read(self, reader: str, place: Path, err: Path, case: str) -> None:
        out = ["--out", place / "out"] if reader == "export" else []
        code = self.server.run(err, reader, place / "run", *out)
        if code and not (reader == "diagnose" and code == 3):
            self._refused(err, case)

    def _refused(self, err: Path, case: str) -> None:
        text = err.read_text(errors="replace")
        if _traceback(err) or "cwdpo: " not in text:
            self.figures.fail("tracebacks", case, text)
        else:
            self.figures.count("damage named")

    def _went_on(self, command: Command, damaged: Path, place: Path, err: Path, case: str) -> None:
        if _traceback(err):
            self.figures.fail("tracebacks", case, err.read_text(errors="replace"))
        # A checkpoint that a later model has made superfluous is not looked at.
        found, wanted = (
            {name: data for name, data in files.items() if not CHECKPOINT.match(name)}
            for files in (contents(place / "run", self.stages[command.name][0]), command.wanted)
        )
        wrong = difference(found, wanted)
        name = damaged.relative_to(place / "run").as_posix()
        twin = self.stages[command.name][0] / name
        if wrong == name and name.startswith("data/") and _rows(damaged) == _rows(twin):
            self.figures.count("damage that changes no row")
        elif wrong:
            self._save(place)
            self.figures.fail("wrong continuations", case, f"went on without a word and differs: {wrong}")
        else:
            self.figures.count("damage healed")

    # --- inputs -----------------------------------------------------------------------------------------

    def inputs(self, number: int) -> None:
        """A hundred mutated inputs of all kinds."""
        from chaos.inputs import formats
        from cwdpo.errors import CwdpoError

        kinds = formats()
        for index in range(number * 100, (number + 1) * 100):
            case = f"inputs:{index}"
            rng = Random(f"{self.seed} {case}")
            name = rng.choice(list(kinds))
            kind = kinds[name]
            place = self.place / "case"
            _clear(place)
            place.mkdir()
            for other, data in kind.beside:
                (place / other).write_bytes(data)
            path = place / kind.name
            path.write_bytes(mutate(kind.good, rng))
            self.figures.count("mutated inputs", f"mutated inputs: {name.split()[0]}")
            try:
                with _limited(SECONDS_PER_INPUT):
                    kind.read(path)
            except CwdpoError as error:
                if not str(error):
                    self.figures.fail("tracebacks", f"{case} ({name})", "an error without words")
            except _TooSlowError:
                self.figures.fail("hangs", f"{case} ({name})", repr(path.read_bytes()[:500]))
            except Exception:
                self.figures.fail("tracebacks", f"{case} ({name})", traceback.format_exc())

    # --- all --------------------------------------------------------------------------------------------

    def until(self, end: float) -> None:
        """Take turns until the time is up."""
        turns: list[tuple[Callable[[int], None], int]] = [
            (self.kill, 6),
            (self.damage, 20),
            (self.inputs, 4),
            (self.shortage, 1),
        ]
        done = Counter[str]()
        while time.monotonic() < end:
            print(f"chaos: {self.figures.line()}", flush=True)
            for turn, times in turns:
                for _ in range(times):
                    if time.monotonic() < end:
                        self.one(turn, done[turn.__name__])
                        done[turn.__name__] += 1

    def one(self, turn: Callable[[int], None], number: int) -> None:
        """One case; a command that is stuck is a failure."""
        try:
            turn(number)
        except TimeoutError as error:
            self.figures.fail("hangs", f"{turn.__name__}:{number}", str(error))
            self.server.stop()
        except URLError as error:
            self.figures.fail("wrong continuations", f"{turn.__name__}:{number}", f"no page: {error}")
            self.server.stop()


class _TooSlowError(BaseException):
    """Raised by the alarm; no reader may catch it."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TooSlowError

    # Of this process's own time: the machine may be busy with other work.
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _clear(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _rows(path: Path) -> list[Any]:
    """What a run takes from a file of rows: a key that no format reads may be there or not."""
    from cwdpo.data.read.reader import read_examples

    found = read_examples(path).examples
    return [(e.id, e.prompt, e.chosen, e.rejected, e.gentle, e.references, dict(e.extra)) for e in found]


def _traceback(err: Path) -> bool:
    return err.is_file() and b"Traceback (most recent call last)" in err.read_bytes()


def main() -> None:
    """Run for a while and print the figures; exit code 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", help="a case, for instance kill:17 or damage:3; inputs:250 runs its hundred"
    )
    parser.add_argument(
        "--shortages",
        nargs="*",
        metavar="COMMAND",
        help="the table of full disks and other shortages alone, of these commands; default: of all",
    )
    parser.add_argument("--keep", action="store_true", help="keep the working folder")
    asked = parser.parse_args()
    os.nice(10)
    begun = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    turn, _, number = (asked.only or "").partition(":")
    chaos = Chaos(place, asked.seed)
    try:
        if turn == "inputs":
            chaos.one(chaos.inputs, int(number) // 100)
        elif asked.shortages is not None:
            chaos.prepare()
            print(Shortages(chaos).all(asked.shortages))
        elif turn:
            chaos.prepare()
            chaos.one(getattr(chaos, turn), int(number))
        else:
            chaos.prepare()
            chaos.until(begun + 60 * asked.minutes)
    finally:
        if hasattr(chaos, "server"):
            chaos.server.close()
        if asked.keep:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    for name in MAIN:
        chaos.figures.counts.setdefault(name, 0)
    print(
        f"chaos, seed {asked.seed}, {(time.monotonic() - begun) / 60:.1f} minutes:\n{chaos.figures.table()}"
    )
    sys.exit(1 if chaos.figures.wrong else 0)


if __name__ == "__main__":
    main()
