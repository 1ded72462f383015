"""What of small updates arrives in bf16 weights, by optimizer, measured and against float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cwdpo.config import parse_recipe
from cwdpo.dynamics.diagnose import diagnose_rows
from cwdpo.errors import RecipeError
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.stage.listener import Listener
from cwdpo.trainer.rounding import LostUpdates, check_optimizer, optimizer_class

STEPS = 40


def trained(name: str, dtype: torch.dtype, rate: float = 1e-6) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean change of a matrix after 40 steps whose gradients have one sign on average, and what was logged."""
    torch.manual_seed(0)
    model = nn.Linear(256, 64, bias=False).to(dtype)
    start = model.weight.detach().float().clone()
    args = SimpleNamespace(learning_rate=rate, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-8)
    made = optimizer_class(name, args)  # type: ignore[arg-type]
    cls, settings = made or (torch.optim.AdamW, {"lr": rate, "betas": (0.9, 0.98)})
    optimizer: Any = cls([{"params": [model.weight], "weight_decay": 0.0}], **settings)
    lost = LostUpdates()
    lost.on_train_begin(None, None, None, model=model)
    for step in range(STEPS):
        noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
        model.weight.grad = (1e-3 * noise + 2e-3).to(dtype)
        lost.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        lost.on_optimizer_step(None, None, None, optimizer=optimizer)
    change = model.weight.detach().float() - start
    kept = optimizer.state[model.weight].get("kahan_comp")
    return change if kept is None else change + kept.float(), lost.flush(Accelerator(cpu=True))


def test_updates_of_a_small_rate_by_optimizer() -> None:
    wanted, nothing = trained("adamw", torch.float32)
    assert nothing == {}, "float32 weights are not watched"
    share = {}
    for name in ("adamw", "adamw_kahan"):
        change, logged = trained(name, torch.bfloat16)
        share[name] = float(change.mean() / wanted.mean())
        assert logged["updates/kept"] == pytest.approx(share[name], abs=0.06), name
    assert share["adamw"] < 0.1
    assert share["adamw_kahan"] == pytest.approx(1, abs=0.06)


def test_a_rate_that_bf16_can_follow_loses_little() -> None:
    assert trained("adamw", torch.bfloat16, rate=1e-3)[1]["updates/kept"] == pytest.approx(1, abs=0.05)


def recipe(**train: Any) -> Any:
    return parse_recipe({
        "model": {"path": "embedded", "device": "cpu", "freeze": ["vision"], "dtype": "bfloat16"},
        "data": {"world": {"seed": 1, "train": 32, "validation": 8, "test": 0}, "stage1_fraction": 0.5},
        "stage1": {"enabled": False},
        "stage2": {"objective": {"name": "dpo"}, "learning_rate": 1e-6, "steps": 8},
        "train": {"batch_size": 4, "logging_steps": 1, "warmup_steps": 0, "save_steps": 4, **train},
        "probes": {"every": 8, "prompts": 4}, "evaluation": {"prompts": 0}, "stop": [],
    })  # fmt: skip


@pytest.mark.parametrize(("optimizer", "lost"), [("adamw", True), ("adamw_kahan", False)])
def test_a_run_says_whether_its_updates_are_lost(tmp_path: Path, optimizer: str, lost: bool) -> None:
    run = train_two_stage(recipe(optimizer=optimizer), tmp_path / "run")
    rows = [row for row in run.metrics() if "updates/kept" in row]
    assert len(rows) == 8
    assert all((row["updates/kept"] < 0.3) == lost for row in rows)
    assert ("lost_updates" in {f.name for f in diagnose_rows(run.readings(), run.metrics())}) == lost


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_left_out(tmp_path: Path) -> None:
    """Kahan's remainders and moments are in the checkpoints: the weights end bit for bit as without a stop."""

    class Killed(BaseException):
        pass

    def stop(stage: str, step: int, steps: int) -> None:
        if step == 6:
            raise Killed

    made = recipe(optimizer="adamw_kahan")
    whole = train_two_stage(made, tmp_path / "whole")
    with pytest.raises(Killed):
        train_two_stage(made, tmp_path / "resumed", listener=Listener(step=stop))
    resumed = train_two_stage(made, tmp_path / "resumed", resume=True)
    files = [run.path / "model" / "model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole.metrics() == resumed.metrics()


def test_an_optimizer_for_bf16_weights_needs_some() -> None:
    check_optimizer("adamw", nn.Linear(2, 2))
    check_optimizer("adamw_kahan", nn.Linear(2, 2).to(torch.bfloat16))
    with pytest.raises(
        RecipeError, match="adamw_kahan is for trained weights in bf16, but no trained weight is bf16"
    ):
        check_optimizer("adamw_kahan", nn.Linear(2, 2))
