"""Whole jobs in turn: stage 2 by ``cwdpo train`` and by TRL's DPOTrainer, from process start to saved model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from cwdpo.errors import CwdpoError
from cwdpo.files.reading import read_jsonl
from cwdpo.files.writing import write_text
from cwdpo.lab.bench import trl_job
from cwdpo.lab.bench.job import LEARNING_RATE, MODEL, TRAIN, Job, recipe_of, write_inputs
from cwdpo.lab.bench.setting import TEXT_MODULES, Setting

OURS, THEIRS = "cwdpo", "trl"
REST = "start of Python, imports, end"
EPOCH_ROWS = 2000
EPOCHS = (1, 3)
GROUPS = {
    "reading rows": ("data", "encoding"),
    "loading the model": ("loading the model",),
    "reference pass": ("reference pass",),
    "calibration": ("calibration",),
    "probes": ("probes",),
    "steps": ("step", "other"),  # the optimizer's own time belongs to no part
    "evaluation": ("evaluation",),
    "saving": ("saving", "checkpoints"),
    "report": ("report",),
}
"""Parts of a run by what they are spent for; a part of a part counts with its whole."""
COMPARED = 4
"""Rows whose gradients are compared first."""

Phases = dict[str, tuple[float, float]]
"""Wall seconds and CPU seconds of each phase."""


def end_to_end_report(
    job: Job, repeats: int, say: Callable[[str], None], *, completions_only: bool = True
) -> dict[str, Any]:
    """Run both jobs in turn, each in a process of its own, on the same rows and model.

    Args:
        job: what both do.
        repeats: number of runs of each; the one that begins changes.
        say: called with a text before each part.
        completions_only: let TRL score completion tokens only, as it does where Triton is available.

    Returns:
        The largest difference of the gradients of a DPO step; for each side the runs with wall and CPU seconds, phases
        and peak memory; the ratios TRL / ours; and both jobs extrapolated to :data:`EPOCH_ROWS` rows.

    Raises:
        CwdpoError: a job failed.
    """
    with tempfile.TemporaryDirectory(prefix="cwdpo-bench-") as temporary:
        folder = Path(temporary)
        say("writing the inputs")
        write_inputs(job, folder)
        say("gradients")
        difference, scale = gradients(job, folder)
        runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
        for repeat in range(repeats):
            for side in (OURS, THEIRS) if repeat % 2 == 0 else (THEIRS, OURS):
                say(f"run {repeat + 1} of {repeats}: {side}")
                out = folder / f"{side}{repeat}"
                start = _own_command if side == OURS else _trl_command
                command = start(job, folder, out, completions_only)
                runs[side].append(_measured(command, out, job.threads))
    return {
        "job": asdict(job),
        "completions_only": completions_only,
        "gradient": {"largest_difference": difference, "largest": scale},
        "runs": runs,
        "ratio": {key: _ratios(runs, key) for key in ("wall", "cpu")},
        "extrapolated": [extrapolated(job, runs, EPOCH_ROWS, epochs) for epochs in EPOCHS],
    }


def gradients(job: Job, folder: Path) -> tuple[float, float]:
    """``(largest difference, largest gradient)`` of a DPO step of both trainers on the job's first rows."""
    import torch
    from PIL import Image

    from cwdpo.data.read.reader import read_examples
    from cwdpo.lab.bench.measure import quiet
    from cwdpo.lab.bench.steps import Bench, largest_difference, moved_copy, own_step, trl_steps
    from cwdpo.models.load import load_policy

    quiet(job.threads)
    settings = recipe_of(job, folder).model
    policy = load_policy(settings)
    model: Any = policy.model.train()
    if job.tune == "lora":
        with torch.no_grad():  # with lora_B = 0 the gradients of lora_A would be 0
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 2e-3)
    examples = read_examples(folder / TRAIN, limit=COMPARED).examples
    encoded = policy.encoder().encode_all(examples, "rejected", require_negative=True)[0]
    rows = [row for row, _ in zip(read_jsonl(folder / TRAIN), range(COMPARED), strict=False)]
    for row in rows:
        row["images"] = [Image.open(folder / path) for path in row["images"]]
    setting = Setting(tune=job.tune, negatives=COMPARED)
    reference = model if job.tune == "lora" else moved_copy(model)
    steps = {"cwdpo": own_step(setting, model, reference, encoded)}
    steps |= trl_steps(setting, model, reference, policy.processor, rows)
    bench = Bench(setting, model, steps)
    return largest_difference(bench.gradients("trl_completions"), bench.gradients("cwdpo"))


def _own_command(job: Job, folder: Path, out: Path, completions_only: bool) -> list[str]:
    del completions_only
    recipe = folder / "recipe.yaml"
    write_text(recipe, recipe_of(job, folder).to_yaml())
    return [sys.executable, "-m", "cwdpo", "train", str(recipe), "--out", str(out)]


def _trl_command(job: Job, folder: Path, out: Path, completions_only: bool) -> list[str]:
    asked = {
        "rows": str(folder / TRAIN), "model": str(folder / MODEL), "out": str(out), "tune": job.tune,
        "phases": str(_phases_file(out)), "targets": TEXT_MODULES, "steps": job.steps, "batch_size": job.batch_size,
        "learning_rate": LEARNING_RATE, "workers": job.workers, "threads": job.threads,
        "completions_only": completions_only,
    }  # fmt: skip
    file = out.with_suffix(".json")
    write_text(file, json.dumps(asked))
    return [sys.executable, str(Path(trl_job.__file__)), str(file)]


def _phases_file(out: Path) -> Path:
    return out.with_suffix(".phases.json")


def _measured(command: list[str], out: Path, threads: int) -> dict[str, Any]:
    """Run a job; wall and CPU seconds of the whole process, those of its phases, and its peak resident memory.

    Raises:
        CwdpoError: it failed; with the end of its output.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = out.with_suffix(".log")
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
    wall, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise CwdpoError(
            f"{' '.join(command)}: exit code {process.returncode}; the end of its output:\n{said}"
        )
    theirs = _phases_file(out)
    phases: Phases = (
        {name: (w, c) for name, (w, c) in json.loads(theirs.read_text(encoding="utf-8")).items()}
        if theirs.is_file()
        else own_phases(list(read_jsonl(out / "timings.jsonl")))
    )
    known_wall, known_cpu = (sum(p[i] for p in phases.values()) for i in (0, 1))
    phases[REST] = max(0.0, wall - known_wall), max(0.0, cpu - known_cpu)
    more = {} if theirs.is_file() else _own_counts(out)
    return {"wall": wall, "cpu": cpu, "peak_bytes": usage.ru_maxrss * 1024, "phases": phases, **more}


def own_phases(rows: list[Mapping[str, Any]]) -> Phases:
    """The phases of a run, from its ``timings.jsonl``."""
    of = {part: group for group, parts in GROUPS.items() for part in parts}
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        for i, key in enumerate(("parts", "cpu")):
            for part, seconds in row.get(key, {}).items():
                sums[of.get(part.partition(":")[0], part)][i] += seconds
    return {name: (wall, cpu) for name, (wall, cpu) in sums.items()}


def _own_counts(out: Path) -> dict[str, Any]:
    """What the extrapolation must know of our run."""
    probes = [row for row in read_jsonl(out / "timings.jsonl") if "probe_prompts" in row]
    calibration = out / "calibration.json"
    known = json.loads(calibration.read_text(encoding="utf-8")) if calibration.is_file() else {}
    return {
        "probe_prompts": probes[-1]["probe_prompts"] if probes else 0,
        "calibration_samples": known.get("n", 0),
    }


def _ratios(runs: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, float]:
    found = [theirs[key] / ours[key] for ours, theirs in zip(runs[OURS], runs[THEIRS], strict=True)]
    return {"median": median(found), "min": min(found), "max": max(found)}


def extrapolated(
    job: Job, runs: Mapping[str, list[dict[str, Any]]], rows: int, epochs: int
) -> dict[str, Any]:
    """What both jobs would take on more rows, from the medians of the measured phases.

    A step costs what it cost. The reference pass and reading grow with the rows. Evaluation and probes grow with the
    held-out prompts up to the default of 64, probes also with the number of measurements, up to their budget of a tenth
    of the training. All else stays. Image features are taken to fit in memory, as they did in the measured run.
    """
    recipe, longer = recipe_of(job, Path()), replace(job, rows=rows)
    steps = math.ceil(rows / job.batch_size) * epochs
    found: dict[str, Any] = {"rows": rows, "epochs": epochs, "steps": steps}
    for i, key in ((0, "wall"), (1, "cpu")):
        ours = {
            name: median(r["phases"].get(name, (0.0, 0.0))[i] for r in runs[OURS]) for name in (*GROUPS, REST)
        }
        more_rows = rows / job.rows
        prompts = min(recipe.evaluation.prompts, longer.held_out) / min(
            recipe.evaluation.prompts, job.held_out
        )
        trained = ours["steps"] / job.steps * steps
        every, extra = recipe.probes.every, 3
        probed = median(r["probe_prompts"] for r in runs[OURS]) or 1
        passes = (steps / every + extra) / (job.steps // every + extra)
        probes = ours["probes"] * passes * min(recipe.probes.prompts, longer.held_out) / probed
        whole = {
            **ours,
            "reading rows": ours["reading rows"] * more_rows,
            "reference pass": ours["reference pass"] * more_rows,
            "evaluation": ours["evaluation"] * prompts,
            "steps": trained,
            "probes": min(probes, max(recipe.probes.budget * trained, ours["probes"])),
        }
        theirs = {
            name: median(r["phases"][name][i] for r in runs[THEIRS]) for name in runs[THEIRS][0]["phases"]
        }
        per_step = theirs.pop("further steps") / (job.steps - 1)
        fixed = sum(theirs.values()) - theirs["first step"]
        found[key] = {OURS: sum(whole.values()), THEIRS: fixed + per_step * steps, "phases": whole}
        found[key]["ratio"] = found[key][THEIRS] / found[key][OURS]
    return found
