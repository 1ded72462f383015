"""The second environment that the families are tested in: torch and torchvision as users have them.

    python tests/families/environment.py        builds it if it is not there, and prints the path of its python

It lies outside the clone, under a name that holds a digest of everything that is installed, so that it is built once a
machine: `$CWDPO_ENVS`, by default `~/.cache/cwdpo/envs`. The builds of torch and torchvision are PyPI's own (for
CUDA; they run on a CPU): next to a CPU build of torch, PyPI's torchvision cannot be imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONSTRAINTS = HERE / "constraints.txt"
TORCH = ("torch", "torchvision")
OF_TESTS = ("pytest", "pytest-xdist")
OF_FAMILIES = ("num2words",)  # SmolVLM's processor


def requirements() -> list[str]:
    """What is installed besides torch: the project's own dependencies, those of its tests, and those of families."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["captions"], *extras["vision"], *OF_TESTS, *OF_FAMILIES]


def folder() -> Path:
    """Where the environment lies."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # The constraints say which versions; a bound that moves in pyproject.toml installs nothing else.
    names = (re.split(r"[<>=~! ]", requirement)[0] for requirement in requirements())
    content = "\n".join([version, CONSTRAINTS.read_text(encoding="utf-8"), *names])
    digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    home = os.environ.get("CWDPO_ENVS") or Path.home() / ".cache" / "cwdpo" / "envs"
    return Path(home) / f"families-{digest}"


def build(place: Path) -> None:
    """Install into ``place``; a build that was cut off is started again."""
    # Wheels of a CPU build that a configuration of pip names would win over PyPI's.
    clean = {k: v for k, v in os.environ.items() if k not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    clean["PIP_CONFIG_FILE"] = os.devnull
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in (TORCH, requirements()):
        subprocess.run([*pip, "-c", CONSTRAINTS, *packages], check=True, env=clean, stdout=sys.stderr)
    (place / "complete").touch()


def main() -> None:
    """Build what is not there, and print the path of the environment's python."""
    place = folder()
    if not (place / "complete").is_file():
        print(f"building {place}: about 5 minutes, 6 GB", file=sys.stderr)
        build(place)
    print(place / "bin" / "python")


if __name__ == "__main__":
    main()
