"""The rival of a whole job: TRL's DPOTrainer from rows to a saved model, as a script of TRL's documentation has it.

A process of its own runs this file (``python trl_job.py JOB.json``). It imports nothing of this project, so that its
imports are those of a user of TRL.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

BEGAN, BEGAN_CPU = time.perf_counter(), time.process_time()
PHASES: dict[str, tuple[float, float]] = {}


def mark(name: str, since: tuple[float, float]) -> tuple[float, float]:
    """Add the seconds and CPU seconds since ``since`` to a phase; returns the time now."""
    now = time.perf_counter(), time.process_time()
    wall, cpu = PHASES.get(name, (0.0, 0.0))
    PHASES[name] = wall + now[0] - since[0], cpu + now[1] - since[1]
    return now


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows, with the paths of their images from here."""
    data: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in data:
        row.pop("id")
        row["images"] = [str(path.parent / image) for image in row["images"]]
    return data


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's DPOConfig."""
    return {
        "output_dir": job["out"], "per_device_train_batch_size": job["batch_size"], "max_steps": job["steps"],
        "learning_rate": job["learning_rate"], "dataloader_num_workers": job["workers"], "use_cpu": True,
        "max_length": None,  # TRL's 1024 would cut image tokens
        "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def main(job: dict[str, Any]) -> None:
    """Train, save, and write the phases.

    Args:
        job: ``rows``, ``model``, ``out``, ``phases`` (paths), ``tune``, ``targets`` (of LoRA), ``steps``,
            ``batch_size``, ``learning_rate``, ``workers``, ``threads``, ``completions_only``.
    """
    at = BEGAN, BEGAN_CPU
    import torch
    from datasets import Dataset, Image, List
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(job["threads"])
    warnings.simplefilter("ignore")
    if job["completions_only"]:  # as TRL does where Triton is available
        import trl.trainer.utils as trl_utils

        trl_utils._use_triton = lambda device: True
    at = mark("imports", at)

    dataset = Dataset.from_list(rows_of(Path(job["rows"]))).cast_column("images", List(Image()))
    at = mark("data", at)

    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32)
    at = mark("loading the model", at)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=job["targets"])
    trainer = DPOTrainer(
        model=model,
        processing_class=AutoProcessor.from_pretrained(job["model"]),
        train_dataset=dataset,
        args=DPOConfig(**settings_of(job)),
        peft_config=lora if job["tune"] == "lora" else None,
    )
    at = mark("the trainer", at)

    class Steps(TrainerCallback):  # type: ignore[misc]
        """Counts the time of training from the end of a step to the end of the next one."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """The first step also warms up, and has the set-up before it."""
            nonlocal at
            at = mark("first step" if state.global_step == 1 else "further steps", at)

    trainer.add_callback(Steps())
    trainer.train()
    at = mark("end of training", at)
    trainer.save_model(job["out"])
    mark("saving", at)
    Path(job["phases"]).write_text(json.dumps(PHASES), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
