"""A process that has everything imported and forks one command after another: imports take longer than small runs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

# The forked process is killed, and its locks and files go, as any other's.
SERVER = """
import json, multiprocessing, os, resource, signal, sys, traceback
from pathlib import Path
import cwdpo.pipeline.two_stage, cwdpo.evaluation.run, cwdpo.onpolicy.preferences, cwdpo.pipeline.export
import cwdpo.report.watch, cwdpo.report.figures, cwdpo.dynamics.diagnose, cwdpo.lab.ablate, cwdpo.lab.best_of
import torchmetrics.functional.classification
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor
from cwdpo.cli import main as cli

if len(sys.argv) > 1:
    cwdpo.lab.spec.SHIPPED = Path(sys.argv[1])
# Workers of a study are forked, too, from this process, which has imported everything; they die with their parent.
cwdpo.lab.server.METHOD = "fork"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the command begins
print("ready", flush=True)
for line in sys.stdin:
    out, err, limits, *arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk: the write itself says so
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, name), (most, resource.getrlimit(getattr(resource, name))[1]))
        if arguments[0] not in ("report", "watch", "compare"):  # charts take half the time of a small run
            cwdpo.report.figures._drawn = lambda *_, **__: "<svg></svg>"
        sys.argv, code = ["cwdpo", *arguments], 0
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except KeyboardInterrupt:
            code = 130  # around the command, where a process of its own would be importing
        except BaseException:
            traceback.print_exc()
            code = 70
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Runs one command at a time.

    Args:
        limit: seconds after which a command counts as stuck.
        studies: a folder whose studies take the place of the shipped ones, which take minutes.
    """

    def __init__(self, limit: float = 240.0, studies: Path | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *([str(studies)] if studies else [])], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0, env=environment,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.orders, self.answers = self.process.stdin, self.process.stdout
        self.pid, self.limit, self.running = 0, limit, False
        assert self.answers.readline() == b"ready\n"

    def start(
        self, err: Path, *arguments: object, out: Path | None = None, limits: Mapping[str, int] | None = None
    ) -> None:
        """Start a command; what it writes to stderr is appended to ``err``.

        Args:
            out: takes what it prints; default: nothing does.
            limits: of :mod:`resource`, ``RLIMIT_NOFILE`` for instance.
        """
        order = [str(out or os.devnull), str(err), dict(limits or {}), *map(str, arguments)]
        self.orders.write(json.dumps(order).encode() + b"\n")
        self.pid, self.running = int(self.answers.readline()), True

    def follow(self, condition: Callable[[], bool]) -> bool:
        """Wait until something holds; false where the command has ended before.

        Raises:
            TimeoutError: neither within the limit.
        """
        until = time.monotonic() + self.limit
        while not condition():
            if select.select([self.answers], [], [], 0.0005)[0]:
                return False
            if time.monotonic() > until:
                raise TimeoutError("the command is stuck")
        return True

    def signal(self, number: int) -> bool:
        """Send a signal; false where the command had ended by itself."""
        if select.select([self.answers], [], [], 0)[0]:
            return False
        with suppress(ProcessLookupError):  # it ended since
            os.kill(self.pid, number)
            return True
        return False

    def wait(self) -> int:
        """The exit code, negative for a signal.

        Raises:
            TimeoutError: the command is stuck; see :meth:`stop`.
        """
        if not select.select([self.answers], [], [], self.limit)[0]:
            raise TimeoutError("the command is stuck")
        self.running = False
        return int(self.answers.readline())

    def stop(self) -> None:
        """Kill a command that is still running."""
        if self.running:
            self.signal(signal.SIGKILL)
            self.wait()

    def run(self, err: Path, *arguments: object, out: Path | None = None) -> int:
        """Run a command to its end; its exit code."""
        self.start(err, *arguments, out=out)
        return self.wait()

    def close(self) -> None:
        """End the server, and what it runs."""
        self.stop()
        self.process.kill()
        self.process.wait()
        self.orders.close()
        self.answers.close()
