# ruff: noqa: E501 - a table of commands
"""The commands that the harness disturbs: small runs of each, and what a run must leave."""

from __future__ import annotations

import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from chaos.server import Server

RECIPE = """
name: twin
model:
  {path: init, device: cpu, init: {vision_width: 32, vision_layers: 1, width: 32, layers: 2, heads: 2, vocabulary: 400}}
data: {world: {seed: 5, train: 40, validation: 8, test: 0, negatives_per_prompt: 2}, stage1_fraction: 0.5}
stage1: {objective: sft_constrained, learning_rate: 1.0e-3, steps: 5}
stage2: {objective: {name: cw_dpo, beta: 0.3}, learning_rate: 1.0e-3, steps: 6}
train: {batch_size: 4, logging_steps: 2, save_steps: 2, warmup_steps: 2}
calibration: {samples: 16, max_new_tokens: 8}
probes: {every: 3, prompts: 4}
evaluation: {prompts: 4, samples: 1, max_new_tokens: 8, batch_size: 4}
negatives:
  {on_policy_fraction: 0.5, rounds: 2, sampler: {samples: 2, max_new_tokens: 16, batch_size: 4, keep_cut: true}}
stop: []
"""
LORA = """
name: lora
model: {path: BASE, device: cpu, tune: lora, lora: {r: 4, alpha: 8, dropout: 0.1}}
data: {world: {seed: 6, train: 24, validation: 8, test: 0, negatives_per_prompt: 2}, stage1_fraction: 0.5}
stage1: {objective: sft, learning_rate: 1.0e-3, steps: 3}
stage2: {objective: {name: dpo, beta: 0.3}, learning_rate: 1.0e-3, steps: 4}
train: {batch_size: 4, gradient_accumulation_steps: 2, logging_steps: 1, save_steps: 2, warmup_steps: 1}
probes: {every: 2, prompts: 4}
evaluation: {prompts: 4, samples: 1, max_new_tokens: 8, batch_size: 4}
stop: []
"""
TINY = (
    "data.world.train=24", "data.world.validation=8", "data.world.test=4", "stage1.steps=2", "stage2.steps=2",
    "train.batch_size=4", "train.save_steps=1", "calibration.samples=4", "calibration.max_new_tokens=8",
    "probes.prompts=4",
)  # fmt: skip
STUDY = {
    "name": "small", "title": "A small study", "question": "?", "full": "cw_dpo", "common": list(TINY),
    "variants": {
        "cw_dpo": {
            "label": "CW-DPO", "set": ["stage2.objective={name: cw_dpo}"],
            "grid": {"stage2.learning_rate": [1e-5, 1e-4]},
        },
    },
}  # fmt: skip
CHANGING = re.compile(
    r"^reference/|(^|/)(timings\.jsonl|environment\.json|report\.html|\.lock|training_args\.bin|checksums\.json|README\.md)$"
)
"""Files that say when, where or by which command they were made; those of the reference have random names."""
PATIENCE = 60.0
"""Seconds until a page must be answered."""


@dataclass
class Command:
    """A command, what it leaves, and how long it takes undisturbed."""

    name: str
    arguments: Callable[[Path], list[object]]
    """Of a folder of its own."""
    result: Callable[[Path], dict[str, bytes]]
    """Every file that must not differ, by name; ``said`` beside the folder is what the command printed."""
    weight: int = 1
    codes: tuple[int, ...] = (0,)
    """Exit codes of a good end."""
    refuses: str = ""
    """The name in its folder that a second start refuses to overwrite."""
    end: Callable[[Server, Path], None] | None = None
    """For a command without an end: what asks it for its result, and ends it."""
    first: tuple[list[object], ...] = ()
    """Commands that make what this one reads, run once."""
    middles: tuple[str, ...] = ()
    """For a run: names whose appearance marks a moment at which a copy of its folder is kept."""
    wanted: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0


def contents(folder: Path, *others: Path) -> dict[str, bytes]:
    """Every file of a finished folder that must not differ, without its own path and those of ``others``."""

    def bare(data: bytes) -> bytes:
        for place in (folder, *others):
            data = data.replace(os.fsencode(place), b"")
        return data

    return {
        name: bare(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not CHANGING.search(name := path.relative_to(folder).as_posix())
    }


def difference(found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    """Names that differ; empty for none."""
    names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
    return ", ".join(
        f"{n}{'' if n in found else ' (missing)'}{'' if n in wanted else ' (left over)'}" for n in names
    )


def said(place: Path) -> Path:
    """The file that takes what a command prints."""
    return place.with_name(f"{place.name}.said")


def _text(*names: str) -> Callable[[Path], dict[str, bytes]]:
    """A result: what was printed, and these files."""

    def result(place: Path) -> dict[str, bytes]:
        files = {name: (place / name).read_bytes() for name in names}
        return {
            name: data.replace(os.fsencode(place), b"")
            for name, data in {**files, "what it printed": said(place).read_bytes()}.items()
        }

    return result


def _study(place: Path) -> dict[str, bytes]:
    """Tables and models of a study; its other files hold times, and shared first stages are named after the place."""
    return {
        name: data
        for name, data in contents(place / "out").items()
        if re.search(r"^(table\.md|table\.csv|chosen\.yaml|sweep\.md)$|model\.safetensors$|^\.", name)
        and not name.startswith("cells/stage1-")
    }


def _page(place: Path) -> dict[str, bytes]:
    return {"page": (place / "run" / "report.html").read_bytes().replace(os.fsencode(place), b"")}


def _ask(server: Server, place: Path) -> None:
    """Take the page that ``watch`` serves, and interrupt it."""
    address: list[str] = []

    def ready() -> bool:
        text = said(place).read_text(errors="replace") if said(place).is_file() else ""
        address[:] = re.findall(r"http://\S+/(?=\s)", text)
        return bool(address)

    if server.follow(ready):
        with urllib.request.urlopen(address[0], timeout=PATIENCE) as answer:
            (place / "page.html").write_bytes(answer.read())
        server.signal(signal.SIGINT)


def _watched(place: Path) -> dict[str, bytes]:
    page = (place / "page.html").read_bytes()
    return {"page": page.replace(os.fsencode(place), b""), **contents(place / "run")}


def commands(place: Path) -> list[Command]:
    """All commands; the files that they share are written into ``place``.

    The commands of later entries may read what those of earlier ones left in ``twin-NAME``.
    """
    recipe, lora, studies = place / "recipe.yaml", place / "lora.yaml", place / "studies"
    run, adapted = place / "twin-train" / "run", place / "twin-train-lora" / "run"
    recipe.write_text(RECIPE)
    lora.write_text(LORA.replace("BASE", str(run / "model")))
    studies.mkdir()
    (studies / "small.yaml").write_text(yaml.safe_dump(STUDY))
    (studies / "demo.yaml").write_text(yaml.safe_dump({**STUDY, "name": "demo"}))

    def train(recipe: Path) -> Callable[[Path], list[object]]:
        def arguments(place: Path) -> list[object]:
            again = ["--resume"] if (place / "run").is_dir() else []
            return ["train", recipe, "--out", place / "run", *again]

        return arguments

    def evaluate(model: Path) -> Callable[[Path], list[object]]:
        def arguments(place: Path) -> list[object]:
            data = run / "data" / "validation.jsonl"
            return ["evaluate", model, "--data", data, "--metrics", "length,world", "--out",
                    place / "evaluation", "--max-new-tokens", 8, "--samples", 2, "--temperature", 1,
                    "--batch-size", 2]  # fmt: skip

        return arguments

    def of_a_copy(*words: object) -> Callable[[Path], list[object]]:
        def arguments(place: Path) -> list[object]:
            shutil.copytree(run, place / "run", dirs_exist_ok=True)
            return [words[0], place / "run", *words[1:]]

        return arguments

    one, other = place / "twin-evaluate" / "evaluation", place / "other"
    made = run / "data" / "train.jsonl"
    return [
        Command("train", train(recipe), lambda place: contents(place / "run"), weight=18,
                middles=("stage1/model", "stage2/checkpoint-4")),
        Command("train-lora", train(lora), lambda place: contents(place / "run"), weight=9,
                middles=("stage1/checkpoint-2", "stage2/checkpoint-2")),
        Command("sample", lambda place: ["sample", recipe, "--out", place / "pairs.jsonl", f"model.path={run / 'model'}"],
                contents, weight=3, refuses="pairs.jsonl"),
        Command("evaluate", evaluate(run / "model"), lambda place: contents(place / "evaluation"), weight=3),
        Command("export", lambda place: ["export", run, "--out", place / "out"], lambda place: contents(place / "out"),
                weight=2, refuses="out"),
        Command("export-lora", lambda place: ["export", adapted, "--merge", "--out", place / "out"],
                lambda place: contents(place / "out"), weight=2, refuses="out"),
        Command("report", of_a_copy("report"), _page, weight=2),
        Command("diagnose", of_a_copy("diagnose"), _text(), codes=(0, 3)),
        Command("watch", of_a_copy("watch", "--port", 0), _watched, weight=2, end=_ask),
        Command("validate", lambda place: ["validate", made, "--json", "--fix", place / "good.jsonl"],
                contents, refuses="good.jsonl"),
        Command("compare", lambda place: ["compare", one, other / "evaluation", "--out", place / "out"],
                lambda place: contents(place / "out"), weight=2, first=(evaluate(adapted / "model")(other),)),
        Command("best-of", lambda place: ["best-of", made, "--out", place / "out", "--model", "embedded", "--n", 2, "--noise", 0.8],
                contents),
        Command("init-model", lambda place: ["init-model", place / "out", "--width", 32, "--layers", 1], contents,
                refuses="out"),
        Command("ablate", lambda place: ["ablate", "--study", "small", "--seeds", 1, "--jobs", 1, "--out", place / "out"],
                _study),
        Command("sweep", lambda place: ["sweep", "--study", "small", "--finalists", 1, "--jobs", 1, "--out", place / "out"],
                _study),
        Command("demo", lambda place: ["demo", "--jobs", 1, "--out", place / "out"], _study),
    ]  # fmt: skip
