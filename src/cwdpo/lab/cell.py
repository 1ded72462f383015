"""One cell of a study: trains a variant with a seed and computes its figures on the test set."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cwdpo.clock import Clock, running, spent_on
from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import Encoder
from cwdpo.files.writing import write_json, write_text
from cwdpo.judging.base import AUTO, judge_for
from cwdpo.lab.answers import Asked
from cwdpo.lab.captions import Drawing, captions, judged, sampled_entropy
from cwdpo.lab.spec import BestOf, Decodings
from cwdpo.lab.warm import (
    encoder_for,
    first_measured,
    held_rows,
    share_features,
    splits_of,
    start_of,
    with_shared_reference,
)
from cwdpo.metrics.base import Answer, reliability
from cwdpo.metrics.token_ece import TokenEce
from cwdpo.models.load import EMBEDDED, Policy, load_policy
from cwdpo.monitor.probe_pass import ProbeSet
from cwdpo.pipeline.run_stage import run_stage
from cwdpo.pipeline.timings import store_timings
from cwdpo.probes.base import PROBES, HeldOut
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.stage.model import load_model, save_model
from cwdpo.stage.splits import Splits
from cwdpo.stage.stage import Stage, StageName
from cwdpo.versions import versions
from cwdpo.worlds.judged import all_judgeable

TEST_PROBES = 96
STEADY_FROM = 20
"""``grad_norm_tail`` leaves out the steps up to this one: the warm-up and the first steps after it."""

OnStep = Callable[[str, int, int], None]
StageOfCell = Literal["stage1", "stage2", "base", "best_of", "flipped", "margins"]


@dataclass(frozen=True)
class CellJob:
    """Everything that a worker process needs to run one cell, or a job whose result several cells use.

    Attributes:
        key: unique name of the cell.
        recipe: the recipe to train.
        folder: the cell's run folder.
        test: the test set.
        stage: ``stage1`` (a first stage that several cells start from), ``stage2`` (one variant), ``base`` (evaluate
            the recipe's model without training), ``best_of`` (sample a preference set), ``flipped`` (exchange chosen
            and rejected in some pairs), ``margins`` (estimate reward margins).
        metrics, judge: metrics and judge for data that is not from the embedded world.
        options: ``trace`` (judge the policy at every measurement), ``keep_model`` (store the model), or the settings
            of ``best_of``, ``flipped`` and ``margins``.
        first: folder of the first stage that the cell starts from, if any.
        decodings: further temperatures for the answers to the test prompts.
    """

    key: str
    recipe: Recipe
    folder: Path
    test: Path
    stage: StageOfCell
    metrics: tuple[str | dict[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    first: Path | None = None
    decodings: Decodings | None = None
    judge: Mapping[str, Any] = field(default_factory=lambda: {"name": AUTO})

    @property
    def result(self) -> Path:
        """The file with the cell's figures."""
        return self.folder / "figures.json"

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the cell; 0 if it does not train or the recipe sets epochs."""
        stage = {"stage1": self.recipe.stage1, "stage2": self.recipe.stage2}.get(self.stage)
        return (stage.steps or 0) if stage else 0


def run_cell(job: CellJob, on_step: OnStep) -> dict[str, Any]:
    """Run a cell and store its figures; a finished cell with the same fingerprint is not run again."""
    run = RunDir(job.folder)
    mark = fingerprint(job)
    if job.result.is_file() and run.json("fingerprint.json") == mark:
        return run.json(job.result.name)
    shutil.rmtree(job.folder)
    write_text(job.folder / "recipe.yaml", job.recipe.to_yaml())
    write_json(job.folder / "fingerprint.json", mark)
    with running(Clock()) as clock:
        if job.stage == "best_of":
            figures = sample_best(job)
        elif job.stage == "flipped":
            figures = flip(job)
        elif job.stage == "margins":
            figures = estimate_margins(job)
        else:
            figures = train_and_measure(job, run, on_step)
        store_timings(run, "end")
    write_json(job.folder / "timing.json", {"seconds": round(clock.elapsed, 1)})
    write_json(job.result, figures)
    return figures


def train_and_measure(job: CellJob, run: RunDir, on_step: OnStep) -> dict[str, Any]:
    """Train one stage (not for ``base``), then compute the figures on the test set (not for ``stage1``)."""
    recipe = job.recipe
    with spent_on("data"):
        splits = None if job.stage == "base" else splits_of(recipe, run)
    with spent_on("loading the model"):
        policy = load_policy(recipe.model) if splits is None else load_model(recipe, splits, run)
        share_features(policy, recipe)
    encoder = encoder_for(policy, recipe)
    listener = Listener(step=on_step)
    if job.stage == "stage1":
        assert splits is not None
        train(job, policy, encoder, splits, run, listener)
        save_model(policy, job.folder / "model", run)
        return {}
    test = held_rows(job.test, recipe)
    own = None if all_judgeable(test) else asked(job, encoder, test)
    # Scored with the model at the start of stage 2, that is with the reference.
    probes = first_measured(policy, encoder, start_of(recipe, job.test), test[:TEST_PROBES])
    trace: list[dict[str, Any]] = []
    if job.options.get("trace"):
        listener.measured = lambda stage, step, model: trace.append(
            {"stage": stage, "step": step, **judged(model, encoder, test)}
        )
    entropy = None
    if job.decodings is not None and job.decodings.same_entropy:
        # Of the reference.
        entropy = own.entropy(policy.model) if own else sampled_entropy(policy.model, encoder, test, 1.0)
    if splits is not None:
        train(job, policy, encoder, splits, run, listener)
        if job.options.get("keep_model"):  # another cell computes reward margins with it
            save_model(policy, job.folder / "model", run)
    with spent_on("evaluation"):
        figures = held_out_figures(policy, test[0], probes, run)
        if own is None:
            figures |= captions(policy.model, encoder, test, job.decodings, entropy)
        else:
            figures |= own.figures(policy.model, entropy)
    return {**figures, "trace": trace} if trace else figures


def asked(job: CellJob, encoder: Encoder, test: Sequence[Example]) -> Asked:
    """How the answers to the test prompts are drawn and measured, for data that is not from the embedded world."""
    sampler = job.recipe.negatives.sampler
    how = Drawing(sampler.max_new_tokens, sampler.batch_size)
    return Asked(encoder, test, job.metrics, judge_for(job.judge, test), job.decodings, how)


def train(
    job: CellJob, policy: Policy, encoder: Encoder, splits: Splits, run: RunDir, listener: Listener
) -> None:
    """Train the cell's stage; all training of the laboratory goes through this function."""
    stage: StageName = "stage1" if job.stage == "stage1" else "stage2"
    examples = splits.stage1 if stage == "stage1" else splits.stage2
    recipe = with_shared_reference(job.recipe, job.first)
    run_stage(Stage(stage, recipe, policy, encoder, run, examples, splits.validation, listener))


def sample_best(job: CellJob) -> dict[str, Any]:
    """Write a preference set with samples of the cell's starting model, see :mod:`cwdpo.lab.best_of`."""
    from cwdpo.lab.best_of import write_best_of

    policy = load_policy(job.recipe.model)
    source, out = Path(str(job.recipe.data.path)), job.folder / "data"
    settings = BestOf.model_validate(job.options)
    return write_best_of(policy, policy.encoder(), source, out, settings, seed=job.recipe.seed)


def flip(job: CellJob) -> dict[str, Any]:
    """Write the training rows with chosen and rejected exchanged in some pairs, see :mod:`cwdpo.lab.flipped`."""
    from cwdpo.lab.flipped import write_flipped

    source, out = Path(str(job.recipe.data.path)), job.folder / "data"
    return write_flipped(source, out, share=float(job.options["share"]), seed=job.recipe.seed)


def estimate_margins(job: CellJob) -> dict[str, Any]:
    """Write the training rows with reward margins from the policy of a finished DPO cell."""
    from cwdpo.lab.margins import write_margins

    return write_margins(
        Path(job.options["policy"]), job.options["reference"], str(job.recipe.data.path),
        job.folder, beta=float(job.recipe.stage2.objective.get("beta", 1.0)),
        image_root=job.recipe.data.image_root,
    )  # fmt: skip


def fingerprint(job: CellJob) -> dict[str, str]:
    """Digests of everything that a cell's figures depend on: recipe, starting weights, rows, options, version."""

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
        "metrics": " ".join(m if isinstance(m, str) else json.dumps(m, sort_keys=True) for m in job.metrics),
        "judge": json.dumps(dict(job.judge), sort_keys=True),
        "decodings": job.decodings.model_dump_json() if job.decodings else "",
        "options": json.dumps(dict(job.options), sort_keys=True)
        + (weights(str(job.options["policy"])) if "policy" in job.options else ""),
        "cwdpo": versions()["cwdpo"],
    }


def held_out_figures(policy: Policy, example: Example, probes: ProbeSet, run: RunDir) -> dict[str, Any]:
    """The probes' readings of a policy, compared with the start of stage 2, and figures of the training run."""
    held = probes.measure(policy.model)
    readings = [r for name in PROBES.names() for r in PROBES.build(name)(held)]
    figures: dict[str, Any] = {r.name: r.value for r in readings}
    figures["reliability"] = reliability_of(held, example)
    figures["n_tokens"] = int(held.top1.numel())
    norms = [(row["step"], row["grad_norm"]) for row in run.metrics() if "grad_norm" in row]
    figures["grad_norm_cv"] = spread([norm for _, norm in norms])
    figures["grad_norm_tail"] = tail([norm for step, norm in norms if step > STEADY_FROM])
    figures["steps_to_95"] = steps_to_share(run.readings(), 0.95)
    return figures


def reliability_of(held: HeldOut, example: Example) -> list[dict[str, float]]:
    """The reliability diagram of the top-1 probability over the M held-out chosen tokens of all prompts together."""
    top1, correct = tuple(held.top1.tolist()), tuple(bool(c) for c in held.correct.tolist())
    return reliability(TokenEce()([Answer(example, top1=top1, correct=correct)])[0])


def spread(values: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation divided by mean; ``None`` for fewer than two values."""
    import numpy as np

    known = np.asarray(values, dtype=float)
    return float(known.std() / known.mean()) if len(known) > 1 and known.mean() > 0 else None


def tail(values: Sequence[float]) -> float | None:
    """95th percentile divided by median, robust to single spikes; ``None`` for fewer than two values."""
    import numpy as np

    if len(values) < 2:
        return None
    middle, high = np.quantile(np.asarray(values, dtype=float), [0.5, 0.95])
    return float(high / middle) if middle > 0 else None


def steps_to_share(readings: Sequence[dict[str, Any]], share: float) -> int | None:
    """First measured step whose held-out margin is at least a share of the best one; ``None`` if none is positive."""
    margins = [(r["step"], r["value"]) for r in readings if r["name"] == "margin" and r["value"] is not None]
    best = max((value for _, value in margins), default=0.0)
    return next((step for step, value in margins if best > 0 and value >= share * best), None)
