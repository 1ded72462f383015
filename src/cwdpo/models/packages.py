"""Packages that a checkpoint needs beside this one's: named with the line that installs them, before data are read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from cwdpo.errors import ModelError
from cwdpo.models.quantization import check_quantization
from cwdpo.models.settings import ModelSettings

_LINES = {
    "torchvision": "pip install 'cwdpo[vision]' (torchvision, of the same build as your torch)",
    "bitsandbytes": "pip install 'cwdpo[quant]'",
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "gptqmodel": "pip install gptqmodel --no-build-isolation",
}
"""Package -> how it is installed, where that is more than ``pip install NAME``."""
_QUANTIZED = {
    "bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors",
    "torchao": "torchao", "hqq": "hqq", "quanto": "optimum.quanto", "fbgemm_fp8": "fbgemm_gpu",
    "auto-round": "auto_round", "eetq": "eetq", "aqlm": "aqlm", "vptq": "vptq",
}  # fmt: skip
"""``quant_method`` of a checkpoint's config -> the package that reads its weights."""
_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_SAID = (
    re.compile(r"requires the (\w[\w.-]*) library"),
    re.compile(r"Missing optional dependencies: (\w[\w.-]*)"),
    re.compile(r"[Pp]ackage `(\w[\w.-]*)` is required"),
    re.compile(r"No module named '(\w+)"),
    re.compile(r"pip install (?:-U |--upgrade )?[`'\"]?([A-Za-z]\w*(?:-\w+)*)"),
)
"""How transformers and Python name a package that is not there."""


def install_line(package: str) -> str:
    """The command that installs a package."""
    return _LINES.get(package, f"pip install {package.replace('_', '-')}")


def missing_package(error: BaseException) -> str | None:
    """The package that an error of transformers asks for; ``None`` where it is about something else."""
    text = str(error)
    if not isinstance(error, ImportError) and "Missing optional dependencies" not in text:
        return None
    found = next((match[1] for pattern in _SAID if (match := pattern.search(text))), None)
    return found and found.lower().rstrip(".")


def check_packages(settings: ModelSettings, *, weights: bool = True) -> None:
    """Look whether everything that a model's processor, weights and attention need is installed; loads no weights.

    Args:
        settings: the recipe's section ``model``.
        weights: whether a folder must have weights, too.

    Raises:
        ModelError: a package is missing, with the line that installs it; the folder holds no checkpoint; or the
            settings contradict the checkpoint's own quantization.
    """
    from cwdpo.models.checkpoint import adapter_base, check_folder
    from cwdpo.models.load import load_processor

    needed = _ATTENTION.get(settings.attention or "")
    if needed is not None:
        _need(needed, f"model.attention: {settings.attention}")
    if settings.quantization is not None:
        _need("bitsandbytes", f"model.quantization: {settings.quantization}")
    if settings.path in ("init", "embedded"):
        return
    check_folder(settings.path, weights=weights, revision=settings.revision)
    source = adapter_base(settings.path, settings.revision) or settings.path
    config = checkpoint_config(source, settings)
    check_quantization(settings, config, source)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in _QUANTIZED:
        _need(_QUANTIZED[method], f"model.path {source!r}: its weights are quantized ({method})")
    tower = config.get("vision_config")
    if isinstance(tower, dict) and tower.get("model_type") == "timm_wrapper":
        _need("timm", f"model.path {source!r}: its vision tower is timm's")
    try:
        load_processor(settings.path, settings)
    except (
        ModelError
    ) as error:  # anything else that is wrong with it is said after the data and the run folder
        if error.__cause__ is not None and missing_package(error.__cause__):
            raise


def _need(package: str, why: str) -> None:
    try:
        there = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        there = False
    if not there:
        raise ModelError(
            f"{why}, which needs a package that is not installed: {install_line(package.split('.')[0])}"
        )


def checkpoint_config(source: str, settings: ModelSettings) -> dict[str, Any]:
    """config.json, also of a checkpoint on the hub; empty where there is none: loading the model says why."""
    from transformers import PretrainedConfig

    try:
        found, _ = PretrainedConfig.get_config_dict(
            source if not Path(source).is_dir() else str(Path(source)), revision=settings.revision
        )
    except (OSError, ValueError):
        return {}
    return dict(found)
