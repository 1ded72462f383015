"""One cell of a comparison: a method, a seed, a learning-rate factor -> figures on the test split."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode import Encoder
from cwdpo.data.read import read_examples
from cwdpo.evaluation.judged import judge_captions
from cwdpo.models.load import EMBEDDED, Policy, load_policy
from cwdpo.models.sample import sample
from cwdpo.probes.base import PROBES, ProbeSet
from cwdpo.probes.calibration import reliability
from cwdpo.records import Example
from cwdpo.rundir import RunDir, versions, write_json, write_text
from cwdpo.training.stage import Listener, run_stage
from cwdpo.training.two_stage import prepare_data, save_model

SAMPLES = 2
MAX_NEW_TOKENS = 40
EVALUATION_BATCH = 100
TEST_PROBES = 96


@dataclass(frozen=True)
class CellJob:
    """What a worker needs to run one cell, or the stage 1 that several cells share."""

    key: str
    recipe: Recipe
    folder: Path
    test: Path
    stage: str  # "stage1", "stage2", or "base" for an evaluation of the starting model alone

    @property
    def result(self) -> Path:
        """Where the cell's figures go."""
        return self.folder / "figures.json"


def run_cell(job: CellJob, on_step: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run a cell and store its figures; a finished cell with the same recipe is not run again."""
    run = RunDir(job.folder)
    mark = fingerprint(job)
    if job.result.is_file() and run.json("fingerprint.json") == mark:
        return run.json(job.result.name)
    shutil.rmtree(job.folder)
    write_text(job.folder / "recipe.yaml", job.recipe.to_yaml())
    write_json(job.folder / "fingerprint.json", mark)
    policy = load_policy(job.recipe.model)
    encoder = Encoder(policy.processor)
    figures: dict[str, Any] = {}
    listener = Listener(step=on_step)
    if job.stage == "stage1":
        splits = prepare_data(job.recipe, run)
        run_stage(policy, encoder, "stage1", job.recipe, splits.stage1, splits.validation, run, listener)
        save_model(policy, job.folder / "model", run)
    else:
        test = read_examples(job.test).examples
        held = encoder.encode_all(test[:TEST_PROBES], "rejected", require_negative=False)[0]
        probes = ProbeSet(held, policy.model)
        if job.stage == "stage2":
            splits = prepare_data(job.recipe, run)
            run_stage(policy, encoder, "stage2", job.recipe, splits.stage2, splits.validation, run, listener)
        figures = evaluate_on_test(policy, encoder, test, probes, run)
    write_json(job.result, figures)
    return figures


def fingerprint(job: CellJob) -> dict[str, str]:
    """What a cell's figures depend on: recipe, starting weights, training and test rows, version."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

    recipe = job.recipe
    start = EMBEDDED if recipe.model.path == "embedded" else Path(recipe.model.path)
    return {
        "recipe": hashlib.blake2b(recipe.to_yaml().encode(), digest_size=16).hexdigest(),
        "model": digest(start / "model.safetensors"),
        "train": digest(Path(str(recipe.data.path))),
        "test": digest(job.test),
        "cwdpo": versions()["cwdpo"],
    }


def evaluate_on_test(
    policy: Policy, encoder: Encoder, test: Sequence[Example], probes: ProbeSet, run: RunDir
) -> dict[str, Any]:
    """All figures of a policy; ``probes`` remembers the start of stage 2, its reference."""
    held = probes.measure(policy.model)
    readings = [r for name in PROBES.names() for r in PROBES.build(name)(held)]
    figures: dict[str, Any] = {r.name: r.value for r in readings}
    figures |= captions(policy, encoder, test)
    figures["reliability"] = reliability(held.top1, held.correct)
    figures["n_tokens"] = int(held.top1.numel())
    norms = [row["grad_norm"] for row in run.metrics() if "grad_norm" in row]
    figures["grad_norm_cv"] = spread(norms)
    figures["steps_to_95"] = steps_to_share(run.readings(), 0.95)
    return figures


def captions(policy: Policy, encoder: Encoder, test: Sequence[Example]) -> dict[str, Any]:
    """Greedy and temperature-1 captions of every test picture, judged."""

    def draw(temperature: float, seed: int) -> list[str]:
        made = sample(
            policy.model, encoder, test, temperature=temperature, max_new_tokens=MAX_NEW_TOKENS,
            batch_size=EVALUATION_BATCH, seed=seed,
        )  # fmt: skip
        return [s.text for s in made]

    greedy = draw(0.0, 0)
    judged = judge_captions(test, greedy)
    sampled = [judge_captions(test, draw(1.0, 1000 + k)) for k in range(SAMPLES)]
    everything = [j for one in sampled for j in one]
    return {
        "greedy_correct": sum(j.all_correct for j in judged) / len(judged),
        "sampled_correct": sum(j.all_correct for j in everything) / len(everything),
        "ill_formed": sum(j.ill_formed for j in everything) / len(everything),
        "judge_score": sum(j.score for j in everything) / len(everything),
        "scores": [[round(one[i].score, 4) for one in sampled] for i in range(len(test))],
        "greedy": greedy,
    }


def spread(values: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation over mean; ``None`` for fewer than two values."""
    import numpy as np

    known = np.asarray(values, dtype=float)
    return float(known.std() / known.mean()) if len(known) > 1 and known.mean() > 0 else None


def steps_to_share(readings: Sequence[dict[str, Any]], share: float) -> int | None:
    """First probed step whose held-out margin reaches a share of the best; ``None`` without a positive one."""
    margins = [(r["step"], r["value"]) for r in readings if r["name"] == "margin" and r["value"] is not None]
    best = max((value for _, value in margins), default=0.0)
    return next((step for step, value in margins if best > 0 and value >= share * best), None)
