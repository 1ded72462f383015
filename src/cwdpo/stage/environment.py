"""Settings that reach transformers around the recipe, by the environment: those that contradict it are refused."""

from __future__ import annotations

import os

from cwdpo.errors import RecipeError

_UNUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "compiled models are not scored: leave dynamo_backend out of accelerate's settings",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used: leave it out of accelerate's settings",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism are not used: leave parallelism_config out",
}
_OFF = ("", "no", "none", "false", "0")


def check_environment(bf16: bool, setting: str = "train.bf16") -> None:
    """Refuse what accelerate's environment asks for against the recipe.

    The reference pass, calibration and probes run under the recipe's own precision. A training step under another
    one starts away from its reference: the first DPO loss is then not ln 2.

    Args:
        bf16: what the recipe says.
        setting: what that is called, for messages.

    Raises:
        RecipeError: the variable, its value, and what to set.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    asked = os.environ.get(name, "").lower()
    if asked not in (*_OFF, "bf16" if bf16 else "no"):
        remedy = (
            f"set {setting} to true" if asked == "bf16" else f"{setting} is the only mixed precision here"
        )
        raise RecipeError(
            f"{name}={asked} (accelerate's mixed_precision) contradicts {setting} = {str(bf16).lower()}: the policy "
            f"would train in another precision than its reference was computed in; {remedy}, or leave the variable out"
        )
    for name, remedy in _UNUSED.items():
        if os.environ.get(name, "").lower() not in _OFF:
            raise RecipeError(f"{name}={os.environ[name]}: {remedy}")
