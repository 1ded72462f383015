"""``cwdpo bench gpu``: all that must be measured on a machine with a GPU, in one call of a few minutes.

Each part stands by itself: one that fails, or for which no time is left, says so in the report and the others run. The
report is written after every part.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cwdpo.errors import CwdpoError
from cwdpo.files.writing import write_text
from cwdpo.lab.bench.batches import batches_report
from cwdpo.lab.bench.data import data_report
from cwdpo.lab.bench.job import Job, recipe_of, write_inputs
from cwdpo.lab.bench.measure import quiet, step_report
from cwdpo.lab.bench.rounding import rounding_report
from cwdpo.lab.bench.sampling import sampling_report
from cwdpo.lab.bench.setting import Setting
from cwdpo.versions import versions

Say = Callable[[str], None]
BATCH = 8
STEPS = 6
"""Prompts, and number, of the steps whose time is slept in the part ``images``."""


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        name: its key in the report.
        minutes: what it takes on a large GPU, about; it is left out if less time is left.
        run: measures it.
    """

    name: str
    minutes: float
    run: Callable[[], Any]


def gpu_report(
    base: Setting, out: Path, *, minutes: float, repeats: int, threads: int, say: Say
) -> dict[str, Any]:
    """Run the parts in order of importance, and write ``out`` after each.

    Args:
        base: device, dtype and lengths; on ``cpu`` every model is the small one, to try the call.
        out: a JSON file.
        minutes: parts that would end later are left out.
        repeats: repetitions of the comparisons.
        threads: CPU threads.
        say: progress.

    Returns:
        ``device``, ``versions``, ``parts`` by name (its figures, or ``{"failed": reason}`` or ``{"left_out": reason}``)
        and ``seconds`` of each.
    """
    quiet(threads)
    report: dict[str, Any] = {"device": _device(base), "versions": versions(), "parts": {}, "seconds": {}}
    begun = time.monotonic()
    for part in _parts(base, repeats, threads, report["parts"], say):
        left = minutes - (time.monotonic() - begun) / 60
        say(f"{part.name}: {left:.1f} minutes left")
        started = time.monotonic()
        if left < part.minutes:
            found: Any = {
                "left_out": f"it takes about {part.minutes:g} minutes, and {max(left, 0):.1f} were left"
            }
        else:
            try:
                found = part.run()
            except (
                Exception
            ) as error:  # out of memory, a package that is missing: the next part may still run
                found = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        report["parts"][part.name] = found
        report["seconds"][part.name] = round(time.monotonic() - started, 1)
        _free()
        write_text(out, json.dumps(report, indent=1) + "\n")
    return report


def check_gpu() -> None:
    """Refuse to start where there is no GPU.

    Raises:
        CwdpoError: torch finds none.
    """
    if not torch.cuda.is_available():
        raise CwdpoError("torch finds no CUDA GPU here (cwdpo env shows what it finds); --cpu tries the call")


def _parts(base: Setting, repeats: int, threads: int, done: dict[str, Any], say: Say) -> Iterator[Part]:
    on_cpu = base.device == "cpu"
    small = base if on_cpu else replace(base, shape="3b")
    large = base if on_cpu else replace(base, shape="7b")

    def step(setting: Setting) -> Callable[[], Any]:
        return lambda: step_report(setting, repeats, threads, say)

    yield Part("exactness", 0.5, lambda: rounding_report(small))
    yield Part("step 3b", 0.7, step(small))
    yield Part("step 3b, 4 negatives", 0.8, step(replace(small, negatives=4)))
    yield Part("batches 3b", 0.7, lambda: batches_report(small, say))
    yield Part("images", 0.8, lambda: _images(base, done))
    yield Part("sampling 3b", 0.4, lambda: sampling_report(small, repeats))
    yield Part("step 7b", 1.0, step(large))
    yield Part("step 3b, live reference", 0.7, step(replace(small, reference="live")))
    yield Part("step 7b, nf4", 1.2, step(replace(large, quantization="nf4")))
    yield Part("step 7b, 4 negatives", 1.2, step(replace(large, negatives=4)))


def _images(base: Setting, done: dict[str, Any]) -> dict[str, Any]:
    """How long steps of :data:`BATCH` prompts wait for their images, by number of workers."""
    job = Job(prompt_tokens=base.prompt_tokens, batch_size=BATCH, rows=STEPS * BATCH)
    step = 0.05 if base.device == "cpu" else done.get("step 3b", {}).get("seconds", {}).get("cwdpo")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(job, Path(folder))
        seconds = BATCH * step if step else 1.0
        return data_report(recipe_of(job, Path(folder)), job.rows, seconds, (0, 2, 4), lambda _: None)


def _device(setting: Setting) -> dict[str, Any]:
    if setting.device == "cpu":
        return {"name": "cpu", "setting": asdict(setting)}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "bf16": torch.cuda.is_bf16_supported(),
        "setting": asdict(setting),
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
