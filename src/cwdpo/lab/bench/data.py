"""Measures the data path of a recipe: what an image costs, and how long a step waits with some numbers of workers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import EncodedPrompt, Encoder
from cwdpo.data.encode.reading import read_ahead
from cwdpo.errors import DataError
from cwdpo.models.load import EMBEDDED, load_processor, read_checkpoint_tokens
from cwdpo.models.sample import begun_prompts
from cwdpo.records import Example
from cwdpo.rundir import RunDir
from cwdpo.stage.model import load_model
from cwdpo.stage.splits import prepare_data

SAMPLED = 32
"""Rows whose images are read in parts, to time decoding and processing apart."""


def data_report(
    recipe: Recipe, rows: int, step: float, workers: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Read the images of a recipe's rows as training does, with a sleep in place of each step.

    Nothing is cached. No weights are read, except where the recipe makes a model from its data.

    Args:
        recipe: its data, processor and ``train.batch_size`` are used.
        rows: rows to read; if the data has fewer with an image, they are repeated.
        step: seconds of each step, in which the processor of this machine is idle.
        workers: numbers of workers to measure.
        say: progress.

    Returns:
        ``decode`` and ``process``: median milliseconds of a row; ``bytes``: median size of its tensors; ``workers``:
        for each number rows per second, and the share of the time in which a step waited for its images.

    Raises:
        DataError: the data has no row with an image.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        splits = prepare_data(recipe, run)
        examples = [e for e in (*splits.stage1, *splits.stage2) if e.images]
        if not examples:
            raise DataError(f"{recipe.data.path or 'data.world'}: no training row has an image to read")
        examples = [examples[i % len(examples)] for i in range(rows)]
        if recipe.model.path == "init":
            processor, tokens = load_model(recipe, splits, run).processor, None
        else:
            source = str(EMBEDDED) if recipe.model.path == "embedded" else recipe.model.path
            processor = load_processor(source, recipe.model)
            tokens = read_checkpoint_tokens(source, recipe.model)
        report: dict[str, Any] = {
            "rows": rows,
            "step": step,
            "batch_size": recipe.train.batch_size,
            "workers": [],
        }
        sizes = recipe.data.image_tokens == "sizes"
        for n in workers:
            encoder = Encoder(processor, cache_gb=0, checkpoint=tokens, from_sizes=sizes, workers=n)
            say(f"encoding {rows} prompts")
            prompts = [encoder.prompt(e) for e in examples]
            if "decode" not in report:
                report |= _parts(encoder, examples[:SAMPLED])
            say(f"{n} workers")
            report["workers"].append({"n": n, **_walk(prompts, recipe.train.batch_size, step, n)})
    return report


def _parts(encoder: Encoder, examples: Sequence[Example]) -> dict[str, float]:
    """Median milliseconds of decoding and of the processor, and bytes of the tensors."""
    decode, process, sizes = [], [], []
    for example in examples:
        began = time.perf_counter()
        for image in example.images:
            image.open()
        decoded = time.perf_counter()
        images = encoder.prompt(example).images
        decode.append(decoded - began)
        process.append(time.perf_counter() - decoded - decode[-1])
        sizes.append(sum(t.numel() * t.element_size() for t in images.values()))
    return {"decode": 1e3 * median(decode), "process": 1e3 * median(process), "bytes": median(sizes)}


def _walk(prompts: Sequence[EncodedPrompt], batch_size: int, step: float, workers: int) -> dict[str, float]:
    for prompt in [prompt.ahead() for prompt in prompts[: 2 * workers]]:  # starts the workers
        _ = prompt.images
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    waited, began = 0.0, time.perf_counter()
    for batch in read_ahead(batches, begun_prompts, len, 1 if workers else 0):
        asked = time.perf_counter()
        for prompt in batch:
            _ = prompt.images
        waited += time.perf_counter() - asked
        time.sleep(step)
    seconds = time.perf_counter() - began
    return {"rows_per_second": len(prompts) / seconds, "waiting": waited / seconds}
