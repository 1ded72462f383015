"""Measures the effect of shared-prefix scoring and of batches by length, for one recipe on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cwdpo.config import Recipe
from cwdpo.lab.bench.measure import quiet
from cwdpo.models.shared_attention import shares_prefix
from cwdpo.pipeline.run_stage import make_trainer
from cwdpo.rundir import RunDir
from cwdpo.scoring.pairs import reference_pass
from cwdpo.scoring.score import row_tokens
from cwdpo.stage.model import encoder_of, load_model
from cwdpo.stage.prepare import encode
from cwdpo.stage.splits import prepare_data
from cwdpo.stage.stage import Stage
from cwdpo.trainer.trainer import PreferenceTrainer

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "before": {"model": {"scoring": "plain", "vision_cache_gb": 0.0}, "train": {"group_by_length": False}},
    "after": {},
}
"""``before``: one sequence per completion, examples in random order. ``after``: the recipe unchanged."""


def recipe_report(recipe: Recipe, steps: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run stage-2 steps of both variants in turn.

    Args:
        recipe: the recipe to train, in a temporary folder.
        steps: optimizer steps of each variant, after one for warm-up.
        threads: CPU threads.
        say: called with a text before each part.

    Returns:
        For each variant: tokens per second (counting each prompt and completion once), share of padding, median
        seconds per step; and the ratio of tokens per second, for all steps and for each half of the steps.
    """
    quiet(threads)
    with tempfile.TemporaryDirectory(prefix="cwdpo-bench-") as folder:
        walks = {}
        for name, changes in VARIANTS.items():
            say(f"preparing: {name}")
            changed = recipe.model_copy(
                update={key: getattr(recipe, key).model_copy(update=own) for key, own in changes.items()}
            )
            walks[name] = _walk(changed, Path(folder) / name)
        found: dict[str, list[tuple[float, int, int, int]]] = {name: [] for name in walks}
        for step in range(steps + 1):
            say(f"step {step} of {steps}")
            for name, walk in walks.items():
                row = next(walk)
                if step:
                    found[name].append(row)
    report: dict[str, Any] = {name: _summary(rows) for name, rows in found.items()}
    halves = [(0, steps // 2), (steps // 2, steps)]
    speeds = [
        [_summary(found[n][a:b])["tokens_per_second"] for n in ("after", "before")]
        for a, b in halves
        if b > a
    ]
    report["ratio"] = report["after"]["tokens_per_second"] / report["before"]["tokens_per_second"]
    report["ratio_of_halves"] = [after / before for after, before in speeds]
    return report


def _walk(recipe: Recipe, folder: Path) -> Iterator[tuple[float, int, int, int]]:
    """For each optimizer step: (seconds, useful tokens, processed tokens, processed tokens with padding)."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    splits = prepare_data(recipe, run)
    policy = load_model(recipe, splits, run)
    encoder = encoder_of(policy, recipe)
    stage = Stage("stage2", recipe, policy, encoder, run, splits.stage2)
    if stage.objective.needs_calibration:  # the cost of a step does not depend on floor and tau
        stage.in_force.objective = stage.objective.calibrated([-3.0, -2.0, -1.0])
    encoded = encode(stage, splits.stage2)
    scored = reference_pass(policy.model, encoded, batch_size=recipe.train.batch_size)
    trainer = make_trainer(stage, scored)
    policy.model.train()
    return _steps(trainer, policy.model, recipe)


def _steps(trainer: PreferenceTrainer, model: Any, recipe: Recipe) -> Iterator[tuple[float, int, int, int]]:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], recipe.stage2.learning_rate
    )
    epoch = 0
    while True:
        loader: Any = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        for inputs in loader:
            began = time.perf_counter()
            totals = trainer.prepare_step([inputs])
            trainer.training_step(model, inputs, totals)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if model.device.type != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            batch = inputs["batch"]
            useful, _ = row_tokens(batch, shared=True)
            yield seconds, useful, *row_tokens(batch, shared=shares_prefix(model))
        epoch += 1


def _summary(rows: list[tuple[float, int, int, int]]) -> dict[str, float]:
    seconds, useful, run, padded = (list(column) for column in zip(*rows, strict=True))
    return {
        "tokens_per_second": sum(useful) / sum(seconds),
        "padding": 1 - sum(run) / sum(padded),
        "seconds_per_step": median(seconds),
        "steps": len(rows),
    }
