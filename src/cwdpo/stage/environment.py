"""Checks environment variables of accelerate that would change training without the recipe."""

from __future__ import annotations

import os
from typing import Any

from cwdpo.errors import RecipeError

_UNUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "compiled models cannot be scored: leave dynamo_backend out of accelerate's settings",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used: leave it out of accelerate's settings",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism are not used: leave parallelism_config out",
}
_OFF = ("", "no", "none", "false", "0")


def check_environment(bf16: bool, setting: str = "train.bf16") -> None:
    """Raise an error if accelerate's environment variables contradict the recipe.

    The reference pass, calibration and probes use the recipe's precision. If training used another one, policy and
    reference would differ before the first update, and the first DPO loss would not be ln 2.

    Args:
        bf16: the recipe's setting.
        setting: its name, for messages.

    Raises:
        RecipeError: names the variable, its value, and what to set.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    asked = os.environ.get(name, "").lower()
    if asked not in (*_OFF, "bf16" if bf16 else "no"):
        remedy = (
            f"set {setting} to true" if asked == "bf16" else f"{setting} is the only mixed precision here"
        )
        raise RecipeError(
            f"{name}={asked} (accelerate's mixed_precision) contradicts {setting} = {str(bf16).lower()}: the policy "
            f"would train in another precision than the reference was scored in; {remedy}, or unset the variable"
        )
    for name, remedy in _UNUSED.items():
        if os.environ.get(name, "").lower() not in _OFF:
            raise RecipeError(f"{name}={os.environ[name]}: {remedy}")


def devices() -> dict[str, Any]:
    """Torch's devices: number of threads, CUDA version, and each GPU with memory and compute capability."""
    import torch

    found: dict[str, Any] = {
        "torch threads": torch.get_num_threads(),
        "cuda of torch": torch.version.cuda or "none",
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        )
    return found
