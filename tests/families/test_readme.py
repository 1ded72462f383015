"""README's way from a recipe to an exported Qwen2.5-VL, word for word; only paths are others."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from PIL import Image

from cwdpo.config import load_recipe

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## On your own model and data")[1].split("\n## ")[0]
COMMANDS = re.findall(r"```\n(.*?)```", SECTION, flags=re.S)[0]
HUB_ID = "Qwen/Qwen2.5-VL-3B-Instruct"
PLACES = ("left of", "right of", "above", "below")
COLOURS = ("red", "blue", "green", "yellow")
LOADED_ELSEWHERE = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
AutoProcessor.from_pretrained(folder)
assert not any(m.split(".")[0] in ("cwdpo", "peft") for m in sys.modules)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the reader's: a checkpoint, and data.jsonl with pictures beside it."""
    folder = tmp_path_factory.mktemp("readme")
    write("qwen2_5_vl", folder / "qwen")
    rows: list[dict[str, Any]] = []
    for i in range(24):
        name = f"{i}.png"
        Image.new("RGB", (56 + 28 * (i % 2), 56), (9 * i, 250 - 9 * i, 40)).save(folder / name)
        one, two = COLOURS[i % 4], COLOURS[(i + 1) % 4]
        where, other = PLACES[i % 4], PLACES[(i + 1) % 4]
        said = f"a {one} square is {{}} a {two} circle on a white table"
        rows.append(
            {
                "image": name,
                "prompt": "Describe the picture.",
                "chosen": said.format(where),
                "rejected": said.format(other),
            }
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def said_commands() -> list[list[str]]:
    """The block's commands of cwdpo, without comments."""
    lines = [shlex.split(line, comments=True) for line in COMMANDS.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "cwdpo"]


def test_the_block_has_the_commands_that_are_tried() -> None:
    assert {words[0] for words in said_commands()} == {
        "env",
        "init",
        "plan",
        "validate",
        "train",
        "diagnose",
        "watch",
        "export",
    }


def test_it_ends_with_an_exported_model(place: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for words in said_commands():
        if words[0] == "watch":  # serves a page until it is ended
            continue
        words = ["qwen" if word == HUB_ID else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "cwdpo.cli.main", *words],
            cwd=place, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        allowed = (0, 3) if words[0] == "diagnose" else (0,)
        assert done.returncode in allowed, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        if words[0] == "init":
            assert load_recipe(place / "my.yaml").model.path == "qwen"
        if words[0] == "validate":
            assert "problems: none" in done.stdout
        if "--show" in words:
            assert done.stdout.count("tokens, not trained") == 3
            assert "<|im_start|>assistant" in done.stdout
        if words[0] == "plan" or "--dry-run" in words:
            assert "it fits" in done.stdout
        if words[0] == "export":
            assert "log-probabilities differ by" in done.stdout
    exported = place / "exported" / "first"
    assert "Preference-tuned with cwdpo" in (exported / "README.md").read_text(encoding="utf-8")
    clean = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, str(exported)],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert clean.returncode == 0, clean.stderr
