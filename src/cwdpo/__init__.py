"""Cooling-Weighted DPO for vision-language models.

Importing this package does not import torch: names that need it are imported when they are first used.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "CWDPOConfig": "cwdpo.pipeline.trl_style",
    "CWDPOTrainer": "cwdpo.pipeline.trl_style",
    "train_two_stage": "cwdpo.pipeline.two_stage",
    "Recipe": "cwdpo.config",
}
__all__ = ["CWDPOConfig", "CWDPOTrainer", "Recipe", "__version__", "train_two_stage"]

# bitsandbytes, which peft imports where it is installed, warns at every start about a kernel that is not used here
# (models/quantization.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from cwdpo.config import Recipe
    from cwdpo.pipeline.trl_style import CWDPOConfig, CWDPOTrainer
    from cwdpo.pipeline.two_stage import train_two_stage


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cwdpo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
