"""Installed versions of packages."""

from __future__ import annotations

from importlib import metadata

PACKAGES = ("cwdpo", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the packages that affect a run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
