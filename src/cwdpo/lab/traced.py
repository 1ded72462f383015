"""A cell whose policy is judged at every measurement: what the alarms are compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.lab.cell import EVALUATION_BATCH, MAX_NEW_TOKENS, CellJob, fingerprint
from cwdpo.lab.worlds import TEST_WORLD_SEED
from cwdpo.models.load import load_policy
from cwdpo.models.sample import sample
from cwdpo.pipeline.run_stage import run_stage
from cwdpo.rundir import RunDir, read_jsonl, write_json, write_text
from cwdpo.stage.listener import Listener
from cwdpo.stage.splits import prepare_data
from cwdpo.stage.stage import Stage
from cwdpo.worlds.judged import judge_captions, summary
from cwdpo.worlds.shapes import ShapesSettings, materialise

JUDGED = 100
"""Test pictures that the policy describes, at temperature 1, after every measurement."""
DROP = 0.03
"""A judged score this far below the start of stage 2 is damage (EVIDENCE: the squeezing alarm's target)."""


def run_traced(job: CellJob, on_step: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Train as the recipe says and judge at every measurement; a finished cell with the same recipe is kept.

    Returns:
        ``trace``: per measurement ``stage``, ``step``, ``score``, ``all_correct``, ``ill_formed``.
    """
    run = RunDir(job.folder)
    mark = fingerprint(job)
    if job.result.is_file() and run.json("fingerprint.json") == mark:
        return run.json(job.result.name)
    shutil.rmtree(job.folder, ignore_errors=True)
    write_text(job.folder / "recipe.yaml", job.recipe.to_yaml())
    write_json(job.folder / "fingerprint.json", mark)
    policy = load_policy(job.recipe.model)
    encoder = Encoder(policy.processor)
    test = read_examples(job.test).examples[:JUDGED]
    trace: list[dict[str, Any]] = []

    def judge(stage: str, step: int, model: Any) -> None:
        made = sample(
            model, encoder, test, max_new_tokens=MAX_NEW_TOKENS, batch_size=EVALUATION_BATCH, seed=1000
        )
        trace.append({"stage": stage, "step": step, **summary(judge_captions(test, [s.text for s in made]))})

    splits = prepare_data(job.recipe, run)
    listener = Listener(step=on_step, measured=judge)
    if job.recipe.stage1.enabled:
        run_stage(
            Stage("stage1", job.recipe, policy, encoder, run, splits.stage1, splits.validation, listener)
        )
    run_stage(Stage("stage2", job.recipe, policy, encoder, run, splits.stage2, splits.validation, listener))
    figures = {"trace": trace, "curriculum": read_jsonl(job.folder / "curriculum.jsonl")}
    write_json(job.result, figures)
    return figures


def scores(figures: dict[str, Any], stage: str = "stage2") -> list[tuple[int, float]]:
    """(step, judged score) of a stage."""
    return [(row["step"], row["score"]) for row in figures["trace"] if row["stage"] == stage]


def damage_step(trace: Sequence[tuple[int, float]], drop: float = DROP) -> int | None:
    """First measured step whose score lies ``drop`` below the first one's; ``None`` where none does."""
    return next((step for step, score in trace if score <= trace[0][1] - drop), None)


def halves(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every other run for choosing thresholds, the rest for reporting; fixed by the order of the keys."""
    ordered = sorted(keys)
    return ordered[::2], ordered[1::2]


def with_recipe(job: CellJob, tree: dict[str, Any]) -> CellJob:
    """The job with sections of its recipe replaced."""
    from cwdpo.config import parse_recipe

    merged = {**job.recipe.model_dump(mode="json"), **tree}
    return replace(job, recipe=parse_recipe(merged))


def write_variant(
    source: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]], limit: int | None
) -> Path:
    """A data file beside ``source`` with every row changed, so that its pictures stay in reach."""
    rows = [change(row) for row in read_jsonl(source)[:limit]]
    path = source.with_name(f"{source.stem}-{name}.jsonl")
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def shared_test(out: Path) -> Path:
    """The pictures on which every cell of a study is judged."""
    world = ShapesSettings(seed=TEST_WORLD_SEED, train=0, validation=1, test=200, questions=0.0)
    return materialise(world, out / "data" / "shared")["test"]


def training_steps(jobs: Sequence[CellJob]) -> int:
    """Optimizer steps of cells, for a progress line."""
    total = 0
    for job in jobs:
        wanted = {"stage1": ("stage1",), "stage2": ("stage1", "stage2")}[job.stage]
        total += sum(getattr(job.recipe, stage).steps or 0 for stage in wanted)
    return total
