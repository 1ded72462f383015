"""Environments beside the main one: what is tested in them cannot be installed next to the rest.

    python tests/environments.py families       builds it if it is not there, and prints the path of its python

An environment lies outside the clone, under a name that holds a digest of everything that is installed, so that it is
built once a machine: `$CWDPO_ENVS`, by default `~/.cache/cwdpo/envs`. Its versions are in `tests/NAME/constraints.txt`.

families: torch and torchvision as users have them, PyPI's own builds (for CUDA; they run on a CPU): next to a CPU build
of torch, PyPI's torchvision cannot be imported.

zero: DeepSpeed, which accelerate and transformers import wherever it is installed. (A folder of its own name would be
taken for it.)

trackers: experiment trackers, and gradio for `cwdpo chat`; they do not allow the newest pyarrow and pillow.

serving: vLLM for CPUs, which does not allow the newest transformers. It only serves: the tests run beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Environment:
    """What is installed besides the project's own dependencies.

    Attributes:
        torch: installed first.
        extras: of the project.
        packages: further ones.
        built_for_cuda: take PyPI's builds, also where pip is configured to find others.
        alone: without the project and its dependencies; exactly what the constraints list is installed.
        cost: of building it, for the user.
    """

    torch: tuple[str, ...]
    extras: tuple[str, ...]
    packages: tuple[str, ...]
    built_for_cuda: bool
    cost: str
    alone: bool = False


OF_TESTS = ("pytest", "pytest-xdist")
ENVIRONMENTS = {
    "families": Environment(
        torch=("torch", "torchvision"),
        extras=("captions", "video", "vision", "quant", "bf16"),  # what the recipes of the package ask for
        packages=(*OF_TESTS, "num2words"),  # SmolVLM's processor
        built_for_cuda=True,
        cost="about 5 minutes, 6 GB",
    ),
    "zero": Environment(
        torch=("torch",),
        extras=(),
        packages=(*OF_TESTS, "deepspeed"),
        built_for_cuda=False,
        cost="about 2 minutes, 2 GB",
    ),
    "trackers": Environment(
        torch=("torch",),
        extras=("trackers", "chat"),
        packages=OF_TESTS,
        built_for_cuda=False,
        cost="about 3 minutes, 2 GB",
    ),
    "serving": Environment(
        torch=("torch", "torchvision"),
        extras=(),
        packages=(),
        built_for_cuda=True,
        cost="about 8 minutes, 6 GB",
        alone=True,
    ),
}


def requirements(environment: Environment) -> list[str]:
    """What is installed besides torch: the project's own dependencies, its extras, and further packages."""
    if environment.alone:
        return list(environment.packages)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = [requirement for extra in environment.extras for requirement in extras[extra]]
    return [*project["dependencies"], *own, *environment.packages]


def constraints(name: str) -> Path:
    """The file with the versions of an environment."""
    return TESTS / name / "constraints.txt"


def folder(name: str) -> Path:
    """Where an environment lies."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # The constraints say which versions; a bound that moves in pyproject.toml installs nothing else.
    names = (re.split(r"[<>=~! ]", requirement)[0] for requirement in requirements(ENVIRONMENTS[name]))
    content = "\n".join([version, constraints(name).read_text(encoding="utf-8"), *names])
    digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    home = os.environ.get("CWDPO_ENVS") or Path.home() / ".cache" / "cwdpo" / "envs"
    return Path(home) / f"{name}-{digest}"


def build(name: str, place: Path) -> None:
    """Install into ``place``; a build that was cut off is started again."""
    environment, variables = ENVIRONMENTS[name], dict(os.environ)
    if environment.built_for_cuda:
        # Wheels of a CPU build that a configuration of pip names would win over PyPI's.
        for key in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            variables.pop(key, None)
        variables["PIP_CONFIG_FILE"] = os.devnull
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    rest = ("--no-deps", "-r", str(constraints(name))) if environment.alone else requirements(environment)
    for packages in (environment.torch, rest):
        command = [*pip, "-c", constraints(name), *packages]
        subprocess.run(command, check=True, env=variables, stdout=sys.stderr)
    (place / "complete").touch()


def main(name: str) -> None:
    """Build what is not there, and print the path of the environment's python."""
    place = folder(name)
    if not (place / "complete").is_file():
        print(f"building {place}: {ENVIRONMENTS[name].cost}", file=sys.stderr)
        build(name, place)
    print(place / "bin" / "python")


if __name__ == "__main__":
    main(sys.argv[1])
