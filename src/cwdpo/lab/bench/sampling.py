"""Sampling behind one prefill of each prompt, against transformers' ``generate``, in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from cwdpo.lab.bench.setting import Setting, build_model, processor
from cwdpo.lab.bench.steps import encoded_example
from cwdpo.models.inputs import unwrapped
from cwdpo.models.sample import Decoding, shared_prefill

PROMPTS, SAMPLES = 4, 4


def sampling_report(
    setting: Setting, repeats: int, prompts: int = PROMPTS, samples: int = SAMPLES
) -> dict[str, Any]:
    """Tokens per second of both, and the ratio; every response has ``setting.completion_tokens`` tokens.

    Args:
        setting: the model, prompt and length of the responses.
        repeats: repetitions after one for warm-up.
        prompts: prompts of a batch, all with the same tokens and image.
        samples: responses to each.
    """
    made = processor()
    model: Any = build_model(setting, made.tokenizer).eval()
    unwrapped(model).generation_config.eos_token_id = None  # nothing ends early
    unwrapped(model).generation_config.pad_token_id = 0
    prompt = encoded_example(setting, made).prompt
    length = setting.completion_tokens
    ids = torch.tensor([prompt.input_ids] * prompts, device=setting.device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{name: torch.cat([value] * prompts).to(setting.device) for name, value in prompt.images.items()},
        **{
            name: torch.tensor([value] * prompts, device=setting.device)
            for name, value in prompt.per_token.items()
        },
    }
    same = [replace(prompt, image_digest=f"{i}") for i in range(prompts)]
    draws = [str(i) for i in range(prompts * samples)]

    def theirs() -> None:
        model.generate(**inputs, max_new_tokens=length, do_sample=True, top_k=0, num_return_sequences=samples)

    def ours() -> None:
        shared_prefill(model, same, samples, Decoding(1.0, 1.0, length), draws, end_ids=frozenset(), pad=0)

    seconds: dict[str, list[float]] = {"generate": [], "cwdpo": []}
    for repeat in range(repeats + 1):
        for name, run in (("generate", theirs), ("cwdpo", ours)):
            took = _timed(run, setting.device)
            if repeat:
                seconds[name].append(took)
    ratios = [a / b for a, b in zip(seconds["generate"], seconds["cwdpo"], strict=True)]
    tokens = prompts * samples * length
    return {
        "prompts": prompts,
        "samples": samples,
        "tokens_per_second": {name: tokens / median(values) for name, values in seconds.items()},
        "time": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def _timed(run: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began
