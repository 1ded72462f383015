"""By hand: the peak of anonymous memory in every phase of a run under FSDP2 on CPU processes.

``python tests/phase_memory.py N OUT RECIPE [section.key=value ...]`` starts N processes. Each prints, by stage and part
of ``timings.jsonl``, the largest RssAnon and RssFile (mapped pages of files) of a look every 50 ms, in MiB above what
they were before the model was loaded.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import together

EVERY = 0.05
KINDS = ("RssAnon", "RssFile")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
"""glibc gives freed memory back at once, so that what is counted is in use."""


class Looks:
    """The largest values by phase."""

    def __init__(self) -> None:
        self.stage, self.open = "", list[str]()
        self.before: tuple[int, ...] | None = None
        self.most: dict[str, tuple[int, ...]] = {}
        self.lock = threading.Lock()

    def look(self) -> None:
        """Count the memory of now for the phase of now."""
        with self.lock:
            text = Path("/proc/self/status").read_text()
            now = tuple(int(text.split(f"{kind}:")[1].split()[0]) // 1024 for kind in KINDS)
            if self.before is None and self.open == ["loading the model"]:
                self.before = now
            name = self.stage + (" > ".join(self.open) or "other")
            self.most[name] = tuple(map(max, now, self.most.get(name, now)))

    def around(self, work: Callable[..., Any], change: Callable[..., None]) -> Callable[..., Any]:
        """A function that looks, calls ``work``, changes the phase, and looks again."""

        def called(*args: Any) -> Any:
            self.look()
            change(*args)
            found = work(*args)
            self.look()
            return found

        return called

    def keep_looking(self) -> None:
        """Until the process ends."""
        while True:
            self.look()
            time.sleep(EVERY)


def measured(out: str, recipe: str, *settings: str) -> None:
    """Run a recipe and print its peaks."""
    from cwdpo.clock import Clock
    from cwdpo.pipeline import two_stage
    from process_worker import load_recipe, shard_on_cpu

    if int(os.environ["WORLD_SIZE"]) > 1:
        shard_on_cpu()
    looks = Looks()
    Clock.begin = looks.around(Clock.begin, lambda _, name: looks.open.append(name))
    Clock.end = looks.around(Clock.end, lambda _: looks.open.pop())
    two_stage.run_stage = looks.around(
        two_stage.run_stage, lambda stage: setattr(looks, "stage", f"{stage.name}: ")
    )
    threading.Thread(target=looks.keep_looking, daemon=True).start()
    two_stage.train_two_stage(load_recipe(recipe, settings), out)
    before = looks.before or (0, 0)
    for name, values in looks.most.items():
        print(name, *(f"{k} {v - b}" for k, v, b in zip(KINDS, values, before, strict=True)))


if __name__ == "__main__":
    if "RANK" in os.environ:
        measured(*sys.argv[1:])
    else:
        os.environ.update(ALLOCATOR)
        said = together([sys.executable, __file__, *sys.argv[2:]], world=int(sys.argv[1]))
        print("\n".join(f"process {rank}:\n{text}" for rank, text in enumerate(said)))
