"""Paired measurements: each repetition runs every variant once, so that a busy machine slows all of them equally."""

from __future__ import annotations

import gc
import multiprocessing as mp
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cwdpo.lab.bench.setting import Setting
from cwdpo.lab.bench.steps import Bench, build, largest_difference

RIVALS = ("trl", "trl_completions", "trl_cached")
OURS = "cwdpo"


def quiet(threads: int) -> None:
    """Set the number of threads of this process, and switch off warnings and progress messages of libraries."""
    from transformers.utils import logging

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()


def step_report(setting: Setting, repeats: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Time, memory, FLOPs and gradient of one step of TRL's trainer and of ours.

    Args:
        setting: the benchmark setting.
        repeats: number of repetitions after one for warm-up.
        threads: CPU threads.
        say: called with a text before each part.

    Returns:
        For each rival, the ratios (rival / ours) of seconds (median, minimum, maximum), of peak memory and of FLOPs;
        and the largest difference of the gradients from those of ``trl_completions``.
    """
    quiet(threads)
    say("building")
    bench = build(setting)
    names = [*RIVALS, OURS]
    say("gradients")
    difference, scale = largest_difference(bench.gradients("trl_completions"), bench.gradients(OURS))
    say("floating-point operations")
    flops = {name: count_flops(bench, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            say(f"repetition {repeat} of {repeats}: {name}")
            began = time.perf_counter()
            bench.run(name)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    peaks = {}
    if setting.device != "cpu":
        peaks = {name: _cuda_peak(bench, name) for name in names}
    del bench
    gc.collect()
    for name in names:
        if setting.device == "cpu":
            say(f"memory: {name}")
            peaks[name] = _in_new_process(setting, name, threads)
    return {
        "setting": asdict(setting),
        "device": torch.cuda.get_device_name() if setting.device != "cpu" else "cpu",
        "threads": threads,
        "repeats": repeats,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "peak_bytes": peaks,
        "flops": flops,
        "gradient": {"largest_difference": difference, "largest": scale},
        "rivals": {name: _against(name, seconds, peaks, flops) for name in RIVALS},
    }


def _against(name: str, seconds: dict[str, list[float]], peaks: dict[str, int], flops: dict[str, int]) -> Any:
    ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True)]
    return {
        "time": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory": peaks[name] / peaks[OURS],
        "flops": flops[name] / flops[OURS],
    }


def scale_report(
    setting: Setting, *, negatives: Sequence[int], prompts: Sequence[int], repeats: int, threads: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Cost of our step by number of negatives and by prompt length, relative to the first value of each list."""
    quiet(threads)
    groups = {
        "negatives": [replace(setting, negatives=k) for k in negatives],
        "prompt_tokens": [replace(setting, prompt_tokens=p) for p in prompts],
    }
    found = []
    for what, settings in groups.items():
        benches = []
        for one in settings:
            say(f"building {what} = {getattr(one, what)}")
            benches.append(build(one, trl=False))
        seconds: list[list[float]] = [[] for _ in benches]
        for repeat in range(repeats + 1):
            say(f"{what}: repetition {repeat} of {repeats}")
            for times, bench in zip(seconds, benches, strict=True):
                began = time.perf_counter()
                bench.run(OURS)
                if repeat:
                    times.append(time.perf_counter() - began)
        for one, times in zip(settings, seconds, strict=True):
            ratios = [t / first for t, first in zip(times, seconds[0], strict=True)]
            found.append(
                {
                    "what": what,
                    "value": getattr(one, what),
                    "time": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
                    "seconds": median(times),
                }
            )
    return found


def count_flops(bench: Bench, name: str) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of a step.

    Causal attention is counted like full attention, as other counters do. torch's counter does not include its CPU
    attention kernel, so it is added here.
    """
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(
        grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        bench.run(name)
    return int(counter.get_total_flops())


def _cuda_peak(bench: Bench, name: str) -> int:
    bench.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bench.run(name)
    return int(torch.cuda.max_memory_allocated() - before)


def _in_new_process(setting: Setting, name: str, threads: int) -> int:
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_resident_peak, args=(setting, name, threads, queue))
    process.start()
    try:
        return int(queue.get(timeout=3600))
    finally:
        process.join()


def _resident_peak(setting: Setting, name: str, threads: int, queue: Any) -> None:
    """Growth of this process's resident memory over one step, in bytes."""
    import psutil

    quiet(threads)
    bench = build(setting, trl=name != OURS)
    own = psutil.Process()
    gc.collect()
    before, peak, done = own.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own.memory_info().rss)
            done.wait(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bench.run(name)
    done.set()
    watcher.join()
    queue.put(peak[0] - before)
