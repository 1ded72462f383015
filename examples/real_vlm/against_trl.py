"""The same DPO steps by CWDPOTrainer or by TRL's DPOTrainer: losses, gradient norms, time and peak memory, as JSON.

    python against_trl.py ours --model captioner --data best.jsonl
    python against_trl.py trl --model captioner --data best.jsonl     # needs trl

Every step trains on the same rows, and both adapters start from the same weights, so that the numbers must agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import zlib
from pathlib import Path
from typing import Any

import datasets
import torch
import tower  # registers the vision tower
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

LORA = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",
    exclude_modules=r".*(vision_tower|multi_modal_projector).*",
    task_type="CAUSAL_LM",
)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds since the process began, at the end of each step."""

    def __init__(self) -> None:
        self.began, self.steps = time.perf_counter(), list[float]()

    @property
    def now(self) -> float:
        """Seconds since the process began."""
        return round(time.perf_counter() - self.began, 1)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note when a step has ended."""
        self.steps.append(self.now)


def read(data: Path, count: int) -> list[dict[str, Any]]:
    """Rows in TRL's format with their images loaded."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:count]]
    keys = ("prompt", "chosen", "rejected")
    return [
        {"images": [Image.open(data.parent / name).convert("RGB") for name in row["images"]]}
        | {key: row[key] for key in keys}
        for row in rows
    ]


def same_adapter(model: torch.nn.Module) -> None:
    """Fill each LoRA matrix A by its module's name."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            module = name[name.index("language_model") :].split(".lora_A")[0]
            generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) / parameter.shape[1] ** 0.5
            parameter.data.copy_(values)


def build(which: str, model: str, rows: list[dict[str, Any]], shared: dict[str, Any], clock: Clock) -> Any:
    """The trainer, as its documentation builds it."""
    if which == "ours":
        from cwdpo import CWDPOConfig, CWDPOTrainer

        args = CWDPOConfig(objective="dpo", **shared)
        return CWDPOTrainer(model=model, args=args, train_dataset=rows, peft_config=LORA, callbacks=[clock])
    from trl import DPOConfig, DPOTrainer

    images = datasets.Sequence(datasets.Image())
    return DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(max_length=None, **shared),
        train_dataset=datasets.Dataset.from_list(rows).cast_column("images", images),
        processing_class=AutoProcessor.from_pretrained(model),
        peft_config=LORA,
        callbacks=[clock],
    )


def main() -> None:
    """Run one of the two, and print what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("which", choices=("ours", "trl"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", default="against_trl")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    shared = {
        "output_dir": f"{asked.out}/{asked.which}", "per_device_train_batch_size": asked.rows,
        "max_steps": asked.steps, "learning_rate": 1e-4, "beta": 0.1, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    trainer = build(asked.which, asked.model, read(asked.data, asked.rows), shared, clock)
    same_adapter(trainer.model)
    ready = clock.now
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    print(json.dumps({
        "which": asked.which, "tower": tower.__name__, "ready": ready, "steps": clock.steps,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "loss": [round(row["loss"], 5) for row in log],
        "grad_norm": [round(row["grad_norm"], 4) for row in log],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
