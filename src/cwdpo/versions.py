"""Installed versions of packages."""

from __future__ import annotations

from importlib import metadata

PACKAGES = ("cwdpo", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the packages that affect a run."""
    return {name: version_of(name) or "not installed" for name in PACKAGES}


def version_of(package: str) -> str | None:
    """The installed version of a package; ``None`` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
