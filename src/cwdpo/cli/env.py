"""``cwdpo env``: facts about the machine for a bug report, without secrets."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import typer

from cwdpo.cli.common import TOOLS, AsJson

OPTIONAL = (
    "bitsandbytes", "flash-attn", "torchvision", "openai", "pycocoevalcap", "choix", "trl", "deepspeed", "vllm",
)  # fmt: skip
SHOWN = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE", "LOCAL_RANK", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK",
    "TOKENIZERS_PARALLELISM", "TRANSFORMERS_OFFLINE", "WORLD_SIZE",
)  # fmt: skip
"""Variables that are shown. Others are not shown, not even their names: they may be keys or personal data."""


def mount(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("env", rich_help_panel=TOOLS)(env)


def env(as_json: AsJson = False) -> None:
    """Show versions, devices and settings for a bug report; no keys, no paths, no names of files."""
    facts = environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for title, values in facts.items():
        typer.echo(f"{title}:")
        for name, value in values.items():
            typer.echo(f"  {name:<28} {value}")


def environment() -> dict[str, dict[str, Any]]:
    """Versions of packages, system, devices and environment variables, by name."""
    from cwdpo.stage.environment import devices
    from cwdpo.versions import version_of, versions

    optional = {name: version for name in OPTIONAL if (version := version_of(name))}
    return {
        "packages": {**versions(), **optional},
        "system": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "processors": os.cpu_count(),
        },
        "devices": devices(),
        "settings": {name: os.environ[name] for name in SHOWN if name in os.environ},
    }
