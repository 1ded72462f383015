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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.mutate import WHOLE_FILE, mutate
from chaos.server import Server

RECIPE = """
name: twin
model:
  {path: init, device: cpu, init: {vision_width: 32, vision_layers: 1, width: 32, layers: 2, heads: 2, vocabulary: 400}}
data: {world: {seed: 5, train: 40, validation: 8, test: 0, negatives_per_prompt: 2}, stage1_fraction: 0.5}
stage1: {objective: sft_constrained, learning_rate: 1.0e-3, steps: 5}
stage2: {objective: {name: cw_dpo, beta: 0.3}, learning_rate: 1.0e-3, steps: 6}
train: {batch_size: 4, logging_steps: 2, save_steps: 2, warmup_steps: 2}
calibration: {samples: 16, max_new_tokens: 8}
probes: {every: 3, prompts: 4}
evaluation: {prompts: 4, samples: 1, max_new_tokens: 8, batch_size: 4}
negatives:
  {on_policy_fraction: 0.5, rounds: 2, sampler: {samples: 2, max_new_tokens: 16, batch_size: 4, keep_cut: true}}
stop: []
"""
SIGNALS = ("KILL", "TERM", "INT", "INT twice", "STOP and CONT")
CHANGING = re.compile(
    r"^reference/|(^|/)(timings\.jsonl|environment\.json|report\.html|\.lock|training_args\.bin|checksums\.json|README\.md)$"
)
"""Files that say when, where or by which command they were made; those of the reference have random names."""
CHECKPOINT = re.compile(r"^stage[12]/checkpoint-")
SECONDS_PER_INPUT = 10


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

    def table(self) -> str:
        """The figures as text."""
        return "\n".join(f"{n:>8}  {name}" for name, n in sorted(self.counts.items()))


def contents(folder: Path, *others: Path) -> dict[str, bytes]:
    """Every file of a finished folder that must not differ, without its own path and those of ``others``."""

    def bare(data: bytes) -> bytes:
        for place in (folder, *others):
            data = data.replace(os.fsencode(place), b"")
        return data

    return {
        name: bare(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not CHANGING.search(name := path.relative_to(folder).as_posix())
    }


def difference(found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    """Names that differ; empty for none."""
    names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
    return ", ".join(
        f"{n}{'' if n in found else ' (missing)'}{'' if n in wanted else ' (left over)'}" for n in names
    )


@dataclass
class Command:
    """A command, what it leaves, and how long it takes undisturbed."""

    name: str
    arguments: Callable[[Path], list[object]]
    result: Callable[[Path], dict[str, bytes]]
    wanted: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    weight: int = 1


class Chaos:
    """One harness: a folder to work in, a server, a twin."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed, self.figures = place, seed, Figures()
        self.recipe = place / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        self.server: Server
        self.twin = place / "twin" / "run"
        self.commands = self._commands()
        self.middle: list[Path] = []
        self.memory = 0

    def _commands(self) -> list[Command]:
        def train(place: Path) -> list[object]:
            again = ["--resume"] if (place / "run").is_dir() else []
            return ["train", self.recipe, "--out", place / "run", *again]

        def evaluate(place: Path) -> list[object]:
            data = self.twin / "data" / "validation.jsonl"
            return ["evaluate", self.twin / "model", "--data", data, "--metrics", "length,world", "--out",
                    place / "evaluation", "--max-new-tokens", 8, "--samples", 2, "--temperature", 1,
                    "--batch-size", 2]  # fmt: skip

        def sample(place: Path) -> list[object]:
            return ["sample", self.recipe, "--out", place / "pairs.jsonl", "model.path=embedded"]

        def report(place: Path) -> list[object]:
            shutil.copytree(self.twin, place / "run", dirs_exist_ok=True)
            return ["report", place / "run"]

        def export(place: Path) -> list[object]:
            return ["export", self.twin, "--out", place / "out"]

        def page(place: Path) -> dict[str, bytes]:
            return {"page": (place / "run" / "report.html").read_bytes().replace(os.fsencode(place), b"")}

        return [
            Command("train", train, lambda place: contents(place / "run"), weight=8),
            Command("sample", sample, contents, weight=2),
            Command("evaluate", evaluate, lambda place: contents(place / "evaluation"), weight=2),
            Command("export", export, lambda place: contents(place / "out")),
            Command("report", report, page),
        ]

    def prepare(self) -> None:
        """Run every command once undisturbed; keep the run as it stood in the middle, too."""
        self.server = Server(limit=300.0)
        status = Path(f"/proc/{self.server.process.pid}/statm").read_text(encoding="ascii")
        self.memory = int(status.split()[0]) * os.sysconf("SC_PAGE_SIZE")
        for command in self.commands:
            place = self.twin.parent if command.name == "train" else self.place / f"twin-{command.name}"
            place.mkdir()
            err = self.place / f"twin-{command.name}.err"
            begun = time.monotonic()
            self.server.start(err, *command.arguments(place))
            if command.name == "train":
                for number, name in enumerate(("stage1/model", "stage2/checkpoint-4")):
                    if self.server.follow((place / "run" / name).is_dir):
                        self.server.signal(signal.SIGSTOP)
                        shutil.copytree(place / "run", self.place / f"middle-{number}")
                        self.middle.append(self.place / f"middle-{number}")
                        self.server.signal(signal.SIGCONT)
            code = self.server.wait()
            command.seconds = time.monotonic() - begun
            if code:
                sys.exit(f"chaos: the undisturbed {command.name} fails:\n{err.read_text()[-3000:]}")
            command.wanted = command.result(place)
            print(f"chaos: {command.name} takes {command.seconds:.1f} s undisturbed", flush=True)

    # --- kills ------------------------------------------------------------------------------------------

    def kill(self, number: int) -> None:
        """One command, disturbed once or twice at random instants, and started again until it ends."""
        case = f"kill:{number}"
        rng = Random(f"{self.seed} {case}")
        command = rng.choices(self.commands, [c.weight for c in self.commands])[0]
        place, err = self.place / "case", self.place / "case.err"
        _clear(place, err)
        place.mkdir()
        said = f"{case} ({command.name}"
        for _ in range(rng.choice((1, 1, 2))):
            how, instant = rng.choice(SIGNALS), rng.uniform(0, command.seconds)
            said += f", {how} after {instant:.2f} s"
            if self._disturbed(command, place, err, how, instant):
                self.figures.count("kills", f"kills: {how}", f"kills of {command.name}")
        said += ")"
        self._ends_like_its_twin(command, place, err, said)

    def _disturbed(self, command: Command, place: Path, err: Path, how: str, instant: float) -> bool:
        """Start and disturb; whether the command was still running then."""
        until = time.monotonic() + instant
        self.server.start(err, *command.arguments(place))
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
        self.server.wait()
        return hit

    def _ends_like_its_twin(self, command: Command, place: Path, err: Path, case: str) -> None:
        if _traceback(err):
            self.figures.fail("tracebacks", case, err.read_text(errors="replace"))
            err.unlink()
        arguments = command.arguments(place)
        if (
            command.name in ("sample", "export")
            and Path(str(arguments[arguments.index("--out") + 1])).exists()
        ):
            code = 0  # it had ended: a second start refuses to overwrite
        else:
            code = self.server.run(err, *arguments)
        text = err.read_text(errors="replace") if err.is_file() else ""
        if code or _traceback(err):
            self.figures.fail("wrong continuations", case, f"exit code {code}: {text}")
            return
        wrong = difference(command.result(place), command.wanted)
        if wrong:
            self.figures.fail("wrong continuations", case, f"differs from its twin: {wrong}")

    # --- shortages --------------------------------------------------------------------------------------

    def shortage(self, number: int) -> None:
        """One command with too little disk, too few files or too little memory; then again with enough."""
        case = f"shortage:{number}"
        rng = Random(f"{self.seed} {case}")
        command = rng.choices(self.commands, [c.weight for c in self.commands])[0]
        place, err = self.place / "case", self.place / "case.err"
        _clear(place, err)
        place.mkdir()
        name, most = rng.choice(
            (
                ("RLIMIT_FSIZE", int(10 ** rng.uniform(0, 6.5))),
                ("RLIMIT_NOFILE", rng.randrange(12, 64)),
                ("RLIMIT_AS", self.memory + int(rng.uniform(0, 400) * 2**20)),
            )
        )
        said = f"{case} ({command.name}, {name} {most})"
        self.server.start(err, *command.arguments(place), limits={name: most})
        code = self.server.wait()
        self.figures.count("shortages", f"shortages: {name[7:]}")
        text = err.read_text(errors="replace") if err.is_file() else ""
        if code and not _traceback(err) and "cwdpo: " not in text and code > 0:
            self.figures.fail("tracebacks", said, f"exit code {code} without a word: {text}")
        self._ends_like_its_twin(command, place, err, said)

    # --- damage -----------------------------------------------------------------------------------------

    def damage(self, number: int) -> None:
        """One file of a run folder, stopped in the middle or finished, damaged; then the run is resumed and read."""
        case = f"damage:{number}"
        rng = Random(f"{self.seed} {case}")
        source = rng.choice([*self.middle, self.twin])
        place, err = self.place / "case", self.place / "case.err"
        _clear(place, err)
        shutil.copytree(source, place / "run")
        files = sorted(p for p in (place / "run").rglob("*") if p.is_file() and p.name != ".lock")
        # Pictures of the world are many and alike.
        files = [p for p in files if p.suffix != ".png"] + [p for p in files if p.suffix == ".png"][:3]
        path, how = rng.choice(files), rng.choice(list(WHOLE_FILE))
        said = f"{case} ({source.name}, {path.relative_to(place / 'run')}, {how})"
        before = path.read_bytes()
        after = WHOLE_FILE[how](before, rng)
        if after == before:
            return
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)
        self.figures.count("damaged files", f"damaged files: {how}")
        reader = rng.choice((None, None, "report", "diagnose", "export"))
        if reader is not None:
            self._read(reader, place, err, said)
        elif self.server.run(err, *self.commands[0].arguments(place)):
            self._refused(err, said)
        else:
            self._went_on(place, err, said)

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

    def _went_on(self, place: Path, err: Path, case: str) -> None:
        if _traceback(err):
            self.figures.fail("tracebacks", case, err.read_text(errors="replace"))
        # A checkpoint that a later model has made superfluous is not looked at.
        found, wanted = (
            {name: data for name, data in files.items() if not CHECKPOINT.match(name)}
            for files in (contents(place / "run", self.twin), self.commands[0].wanted)
        )
        wrong = difference(found, wanted)
        if wrong:
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
            (self.kill, 3),
            (self.damage, 6),
            (self.inputs, 2),
            (self.shortage, 1),
        ]
        done = Counter[str]()
        while time.monotonic() < end:
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
    for name in (
        "kills",
        "damaged files",
        "mutated inputs",
        "shortages",
        "wrong continuations",
        "tracebacks",
        "hangs",
    ):
        chaos.figures.counts.setdefault(name, 0)
    print(
        f"chaos, seed {asked.seed}, {(time.monotonic() - begun) / 60:.1f} minutes:\n{chaos.figures.table()}"
    )
    sys.exit(1 if chaos.figures.wrong else 0)


if __name__ == "__main__":
    main()
