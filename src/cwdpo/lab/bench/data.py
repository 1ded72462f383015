"""Measures the data path of a recipe: what an image costs, and how long a step waits with some numbers of workers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cwdpo.config import Recipe
from cwdpo.data.encode.encoder import EncodedPrompt, Encoder
from cwdpo.data.encode.image_cache import ImageCache
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
TURNS = 5
"""The numbers of workers take turns, so that other work on the machine slows all of them alike."""


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
        ``decode``, ``process`` and ``stored`` (reading it from ``data.image_cache`` instead): median milliseconds of a
        row; ``bytes``: median size of its tensors; ``workers``: for each number rows per second, the share of the time
        in which a step waited for its images, and the main process's own milliseconds of CPU for a row, which other
        work on the machine does not change.

    Raises:
        DataError: the data has no row with an image.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        splits = prepare_data(recipe, run)
        examples = [e for e in (*splits.stage1, *splits.stage2) if e.images]
        if not examples:
            raise DataError(f"{recipe.data.where}: no training row has an image to read")
        examples = [examples[i % len(examples)] for i in range(rows)]
        if recipe.model.path == "init":
            processor, tokens = load_model(recipe, splits, run).processor, None
        else:
            source = str(EMBEDDED) if recipe.model.path == "embedded" else recipe.model.path
            processor = load_processor(source, recipe.model)
            tokens = read_checkpoint_tokens(source, recipe.model)
        sizes = recipe.data.image_tokens == "sizes"
        encoders = [
            Encoder(processor, cache_gb=0, checkpoint=tokens, from_sizes=sizes, workers=n) for n in workers
        ]
        say(f"encoding {rows} prompts")
        prompts = [[encoder.prompt(e) for e in examples] for encoder in encoders]
        parts = _parts(encoders[0], examples[:SAMPLED], ImageCache(Path(folder) / "cache", 64.0))
        found = [_Walk(n) for n in workers]
        batch = recipe.train.batch_size
        turn = max(1, -(-rows // (TURNS * batch))) * batch
        for start in range(0, rows, turn):
            for walk, own in zip(found, prompts, strict=True):
                say(f"rows {start} to {min(start + turn, rows)} with {walk.n} workers")
                walk.over(own[start : start + turn], batch, step)
    return {"rows": rows, "step": step, "batch_size": batch, **parts, "workers": [w.figures() for w in found]}


def _parts(encoder: Encoder, examples: Sequence[Example], cache: ImageCache) -> dict[str, float]:
    """Median milliseconds of decoding, of the processor and of a read from the cache; bytes of the tensors."""
    decode, process, stored = [], [], []
    sizes: list[int] = []
    for example in examples:
        began = time.perf_counter()
        for image in example.images:
            image.open()
        decoded = time.perf_counter()
        images = encoder.prompt(example).images
        decode.append(decoded - began)
        process.append(time.perf_counter() - decoded - decode[-1])
        key = str(len(sizes))
        cache.put(key, images)
        began = time.perf_counter()
        cache.get(key)
        stored.append(time.perf_counter() - began)
        sizes.append(sum(t.numel() * t.element_size() for t in images.values()))
    times = {"decode": decode, "process": process, "stored": stored}
    return {**{name: 1e3 * median(values) for name, values in times.items()}, "bytes": median(sizes)}


@dataclass
class _Walk:
    """What walks over rows with ``n`` workers took, in seconds: in all, waiting for images, and CPU of this process."""

    n: int
    rows: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    cpu: float = 0.0

    def over(self, prompts: Sequence[EncodedPrompt], batch_size: int, step: float) -> None:
        """Read the prompts as training reads them."""
        for prompt in [prompt.ahead() for prompt in prompts[: 2 * self.n]]:  # starts the workers
            _ = prompt.images
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        began, cpu = time.perf_counter(), time.process_time()
        for batch in read_ahead(batches, begun_prompts, len, 1 if self.n else 0):
            asked = time.perf_counter()
            for prompt in batch:
                _ = prompt.images
            self.waited += time.perf_counter() - asked
            time.sleep(step)
        self.seconds += time.perf_counter() - began
        self.cpu += time.process_time() - cpu
        self.rows += len(prompts)

    def figures(self) -> dict[str, float]:
        """Rows per second, the share of waiting, and milliseconds of this process's CPU for a row."""
        return {
            "n": self.n,
            "rows_per_second": self.rows / self.seconds,
            "waiting": self.waited / self.seconds,
            "own_cpu": 1e3 * self.cpu / self.rows,
        }
