"""The inputs of a whole job: a LLaVA with random weights in the layout of the hub, photographs, rows, and a recipe."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cwdpo.config import Recipe, parse_recipe
from cwdpo.errors import RecipeError
from cwdpo.files.writing import write_text
from cwdpo.lab.bench.setting import IMAGE_SHARE, TEXT_MODULES
from cwdpo.models.tiny import TinyModelSettings, init_model

WORDS = 1000
PATCH = 14
PHOTOGRAPH = (480, 640)
LEARNING_RATE = 1e-4
TRAIN, HELD_OUT, MODEL = "train.jsonl", "validation.jsonl", "model"


@dataclass(frozen=True)
class Job:
    """What both trainers do.

    Attributes:
        prompt_tokens, completion_tokens: about; nine tenths of the prompt are image tokens.
        tune: ``lora`` on the linear layers of the language model, with the vision side frozen; or ``full``.
        steps: optimizer steps.
        batch_size: rows of a step.
        rows: training rows; each has a photograph of its own.
        workers: processes that read images.
        threads: CPU threads.
    """

    prompt_tokens: int = 256
    completion_tokens: int = 64
    tune: Literal["lora", "full"] = "lora"
    steps: int = 20
    batch_size: int = 8
    rows: int = 160
    workers: int = 0
    threads: int = 1

    @property
    def held_out(self) -> int:
        """Held-out rows: as many as the default of ``data.validation_fraction`` would take."""
        return max(1, round(self.rows / 9))

    @property
    def side(self) -> int:
        """Image tokens along each side of a picture."""
        return max(2, math.isqrt(int(self.prompt_tokens * IMAGE_SHARE)))


def write_inputs(job: Job, folder: Path) -> None:
    """Write model, photographs and rows to a folder.

    Raises:
        RecipeError: the prompt is too short for its image.
    """
    if job.prompt_tokens < 32 or job.completion_tokens < 2:
        raise RecipeError(
            f"--prompt-tokens {job.prompt_tokens}: must be at least 32, and --completion-tokens at least 2"
        )
    draw = random.Random(0)
    words = _vocabulary(draw)
    rows = [_row(job, i, words, draw) for i in range(job.rows + job.held_out)]
    (folder / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        _photograph(i).save(folder / row["images"][0], quality=90)
    for name, part in ((TRAIN, rows[: job.rows]), (HELD_OUT, rows[job.rows :])):
        write_text(folder / name, "".join(json.dumps(row) + "\n" for row in part))
    init_model(folder / MODEL, (" ".join(words) for _ in range(4)), shape(job))


def shape(job: Job) -> TinyModelSettings:
    """A LLaVA of about 8 million parameters whose pictures have :attr:`Job.side` squared tokens."""
    return TinyModelSettings(
        image_size=job.side * PATCH, patch_size=PATCH, vision_width=128, vision_layers=4, width=192, layers=6,
        vocabulary=4000, max_positions=2 * (job.prompt_tokens + job.completion_tokens),
    )  # fmt: skip


def recipe_of(job: Job, folder: Path) -> Recipe:
    """Stage 2 with the defaults of every key that the job does not set."""
    lora = {"tune": "lora", "lora": {"target_modules": TEXT_MODULES}, "freeze": ["vision", "projector"]}
    tree = {
        "name": "end-to-end",
        "model": {"path": str(folder / MODEL), "device": "cpu", **(lora if job.tune == "lora" else {})},
        "data": {"path": str(folder / TRAIN), "validation_path": str(folder / HELD_OUT)},
        "stage1": {"enabled": False},
        "stage2": {"learning_rate": LEARNING_RATE, "steps": job.steps},
        "train": {"batch_size": job.batch_size, "dataloader_workers": job.workers},
    }
    return parse_recipe(tree)


def _vocabulary(draw: random.Random) -> list[str]:
    """Words of four letters, few enough that each becomes one token or two."""
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < WORDS:
        found["".join(draw.choices(syllables, k=2))] = None
    return list(found)


def _row(job: Job, index: int, words: list[str], draw: random.Random) -> dict[str, Any]:
    """A row with TRL's columns; responses differ in length by an eighth, as those of people do."""
    around = job.completion_tokens // 8

    def response() -> list[dict[str, Any]]:
        n = max(1, job.completion_tokens + draw.randint(-around, around) - 1)
        return [
            {"role": "assistant", "content": [{"type": "text", "text": " ".join(draw.choices(words, k=n))}]}
        ]

    rest = max(1, job.prompt_tokens - job.side**2 - 4)  # without the markers of the turns
    question = [{"type": "image"}, {"type": "text", "text": " ".join(draw.choices(words, k=rest))}]
    return {
        "id": f"r{index:05d}",
        "images": [f"images/{index:05d}.jpg"],
        "prompt": [{"role": "user", "content": question}],
        "chosen": response(),
        "rejected": response(),
    }


def _photograph(seed: int) -> Any:
    """A picture of smooth random colours: a JPEG of it is as large as one of a photograph."""
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(seed)
    high, wide = PHOTOGRAPH
    coarse = drawn.integers(0, 255, (high // 40, wide // 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((wide, high), Image.Resampling.BICUBIC), dtype=float)
    grain = drawn.normal(0, 6, (high, wide, 1))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
