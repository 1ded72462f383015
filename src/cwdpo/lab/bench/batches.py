"""The largest micro-batch that fits, with and without activation checkpointing, against what ``plan`` says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.lab.bench.setting import Setting, build_model, model_config, model_settings, processor
from cwdpo.lab.bench.steps import BETA, encoded_example, own_step
from cwdpo.models.hollow import hollow_model
from cwdpo.models.shared_attention import use_scoring
from cwdpo.models.vision_cache import keep_vision_features
from cwdpo.objectives.base import OBJECTIVES
from cwdpo.trainer.dry_step import DryRun, HowToStep

MOST, MOST_ON_CPU = 256, 2
"""Prompts of the largest micro-batch that is tried."""


def batches_report(
    setting: Setting, say: Callable[[str], None], most: int | None = None
) -> list[dict[str, Any]]:
    """Micro-batches of 1, 2, 4, ... prompts until one does not fit.

    Args:
        setting: model and row; LoRA, because the reference values are the model's own without its adapter.
        say: progress.
        most: prompts of the largest one; default: :data:`MOST`, on a CPU :data:`MOST_ON_CPU`.

    Returns:
        For each size, without and with checkpointing: bytes that ``plan`` says (weights, adapters, gradients and
        activations; no optimizer state), on a GPU bytes that were measured, seconds of the second step, and whether it
        fits.
    """
    most = most or (MOST_ON_CPU if setting.device == "cpu" else MOST)
    made = processor()
    example = encoded_example(setting, made)
    found = []
    for checkpointing in (False, True):
        one = replace(setting, grad_checkpointing=checkpointing)
        model, planned = build_model(one, made.tokenizer), planner(one, made.tokenizer)
        use_scoring(model, "shared_prefix")
        keep_vision_features(model, 0.0)
        size = 1
        while size <= most:
            say(f"micro-batch of {size}{', checkpointing' if checkpointing else ''}")
            examples = _copies(example, size)
            row = {"prompts": size, "checkpointing": checkpointing, "planned": planned(examples)}
            found.append(row | _measured(one, model, examples))
            if not found[-1]["fits"]:
                break
            size *= 2
        del model
    return found


def planner(setting: Setting, tokenizer: Any) -> Callable[[list[EncodedExample]], int]:
    """Bytes of a micro-batch by the planner's own code: what lies in memory, without optimizer state, and the peak."""
    model, memory = hollow_model(model_config(setting.shape, tokenizer), model_settings(setting))
    objective = OBJECTIVES.build({"name": "dpo", "beta": BETA})
    how = HowToStep(checkpointing=setting.grad_checkpointing, stats=objective.token_stats)
    run, kept = DryRun(model), memory.weights + memory.quantized + memory.adapters
    return lambda examples: kept + run.step(collate(examples), how).peak


def _copies(example: EncodedExample, size: int) -> list[EncodedExample]:
    """Examples with images of their own, so that each is computed."""
    return [
        replace(example, id=f"{i}", prompt=replace(example.prompt, image_digest=f"{i}")) for i in range(size)
    ]


def _measured(setting: Setting, model: Any, examples: list[EncodedExample]) -> dict[str, Any]:
    on_gpu = setting.device != "cpu"
    try:
        step = own_step(setting, model, model, examples)
        model.zero_grad(set_to_none=True)
        step()  # warms up
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {"fits": False, "measured": None, "seconds": None}
    return {
        "fits": True,
        "measured": int(torch.cuda.max_memory_allocated()) if on_gpu else None,
        "seconds": time.perf_counter() - began,
    }
