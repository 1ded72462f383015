"""One cell of a comparison: a method, a seed, a learning-rate factor -> figures on the test split."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.models.load import EMBEDDED, Policy, load_policy
from cwdpo.models.sample import sample
from cwdpo.monitor.probe_pass import ProbeSet
from cwdpo.pipeline.run_stage import run_stage
from cwdpo.probes.base import PROBES
from cwdpo.probes.calibration import reliability
from cwdpo.records import Example
from cwdpo.rundir import RunDir, versions, write_json, write_text
from cwdpo.stage.listener import Listener
from cwdpo.stage.model import load_model, save_model
from cwdpo.stage.splits import prepare_data
from cwdpo.stage.stage import Stage
from cwdpo.worlds.judged import all_judgeable, judge_captions

SAMPLES = 2
MAX_NEW_TOKENS = 40
EVALUATION_BATCH = 100
TEST_PROBES = 96


StageOfCell = Literal["stage1", "stage2", "base", "best_of", "margins"]


@dataclass(frozen=True)
class CellJob:
    """What a worker needs to run one cell, or what several cells share.

    ``stage``: ``stage1`` (the first stage that several cells start from), ``stage2`` (one method), ``base`` (an
    evaluation of the starting model alone), ``best_of`` (a preference set is sampled), ``margins`` (reward margins
    are estimated). ``metrics`` are read where the data has no exact judge; ``options`` are the stage's own.
    """

    key: str
    recipe: Recipe
    folder: Path
    test: Path
    stage: StageOfCell
    metrics: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

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
    began = time.monotonic()
    shutil.rmtree(job.folder)
    write_text(job.folder / "recipe.yaml", job.recipe.to_yaml())
    write_json(job.folder / "fingerprint.json", mark)
    listener = Listener(step=on_step)
    if job.stage == "best_of":
        figures = sample_best(job)
    elif job.stage == "margins":
        figures = estimate_margins(job)
    else:
        figures = train_and_measure(job, run, listener)
    write_json(job.folder / "timing.json", {"seconds": round(time.monotonic() - began, 1)})
    write_json(job.result, figures)
    return figures


def train_and_measure(job: CellJob, run: RunDir, listener: Listener) -> dict[str, Any]:
    """One stage of training (none for ``base``) and, behind it, the figures on the test set."""
    splits = None if job.stage == "base" else prepare_data(job.recipe, run)
    policy = load_policy(job.recipe.model) if splits is None else load_model(job.recipe, splits, run)
    encoder = Encoder(policy.processor, job.recipe.data.max_length, job.recipe.data.cache_gb)
    if job.stage == "stage1":
        assert splits is not None
        run_stage(
            Stage("stage1", job.recipe, policy, encoder, run, splits.stage1, splits.validation, listener)
        )
        save_model(policy, job.folder / "model", run)
        return {}
    data = job.recipe.data
    test = read_examples(
        job.test, default_prompt=data.default_prompt, format=data.format, ignore_columns=data.ignore_columns
    ).examples
    held = encoder.encode_all(test[:TEST_PROBES], "rejected", require_negative=False)[0]
    probes = ProbeSet(held, policy.model)
    if splits is not None:
        run_stage(
            Stage("stage2", job.recipe, policy, encoder, run, splits.stage2, splits.validation, listener)
        )
        if job.options.get("keep_model"):  # another cell reads its rewards
            save_model(policy, job.folder / "model", run)
    return evaluate_on_test(policy, encoder, test, probes, run, job.metrics)


def sample_best(job: CellJob) -> dict[str, Any]:
    """A preference set whose chosen responses are only better, sampled from the cell's starting model."""
    from cwdpo.lab.best_of import write_best_of

    policy = load_policy(job.recipe.model)
    source, out = Path(str(job.recipe.data.path)), job.folder / "data"
    return write_best_of(policy, Encoder(policy.processor), source, out, seed=job.recipe.seed, **job.options)


def estimate_margins(job: CellJob) -> dict[str, Any]:
    """The training rows with the reward margins that a finished DPO cell implies."""
    from cwdpo.lab.margins import write_margins

    return write_margins(
        Path(job.options["policy"]), job.options["reference"], str(job.recipe.data.path),
        job.folder, beta=float(job.recipe.stage2.objective.get("beta", 1.0)),
        image_root=job.recipe.data.image_root,
    )  # fmt: skip


def fingerprint(job: CellJob) -> dict[str, str]:
    """What a cell's figures depend on: recipe, starting weights, training and test rows, version."""

    def digest(path: Path) -> str:
        if not path.is_file():
            return "not a file"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

    def weights(source: str) -> str:
        folder = EMBEDDED if source == "embedded" else Path(source)
        return "-".join(digest(f) for f in sorted(folder.glob("*.safetensors"))) or source

    recipe = job.recipe
    return {
        "recipe": hashlib.blake2b(recipe.to_yaml().encode(), digest_size=16).hexdigest(),
        "model": weights(recipe.model.path),
        "train": digest(Path(str(recipe.data.path))),
        "test": digest(job.test),
        "stage": job.stage,
        "metrics": " ".join(job.metrics),
        "options": json.dumps(dict(job.options), sort_keys=True)
        + (weights(str(job.options["policy"])) if "policy" in job.options else ""),
        "cwdpo": versions()["cwdpo"],
    }


def evaluate_on_test(
    policy: Policy,
    encoder: Encoder,
    test: Sequence[Example],
    probes: ProbeSet,
    run: RunDir,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures of a policy; ``probes`` remembers the start of stage 2, its reference."""
    held = probes.measure(policy.model)
    readings = [r for name in PROBES.names() for r in PROBES.build(name)(held)]
    figures: dict[str, Any] = {r.name: r.value for r in readings}
    if all_judgeable(test):
        figures |= captions(policy, encoder, test)
    else:
        figures |= responses(policy, encoder, test, metrics)
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


def responses(
    policy: Policy, encoder: Encoder, test: Sequence[Example], metrics: Sequence[str]
) -> dict[str, Any]:
    """Greedy responses to every test prompt and what the named metrics say of them."""
    from cwdpo.metrics.base import METRICS, Answer

    made = sample(
        policy.model,
        encoder,
        test,
        temperature=0.0,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=EVALUATION_BATCH,
    )
    answers = [Answer(e, s.text) for e, s in zip(test, made, strict=True)]
    measured = [m for name in metrics for m in METRICS.build(name)(answers)]
    return {**{m.name: m.value for m in measured}, "greedy": [s.text for s in made]}


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
