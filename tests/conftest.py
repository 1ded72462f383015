"""Fixtures: a small random LLaVA folder, a small written world, and what both give when encoded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing is compiled here, and bitsandbytes, which peft imports, would load the whole compiler in every process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest

from fake_hub import hub  # noqa: F401 - a fixture of every test
from fake_server import serve  # noqa: F401 - a fixture of every test
from server import served  # noqa: F401 - a fixture of every test


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cwdpo.worlds.shapes import ShapesSettings, materialise

    folder = tmp_path_factory.mktemp("world")
    materialise(ShapesSettings(seed=5, train=48, validation=16, test=0, negatives_per_prompt=2), folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cwdpo.models.tiny import TinyModelSettings, init_model
    from cwdpo.worlds.shapes import VOCABULARY

    folder = tmp_path_factory.mktemp("model") / "llava"
    shape = TinyModelSettings(vision_width=32, vision_layers=1, width=32, layers=2, heads=2, vocabulary=400)
    init_model(folder, [" ".join(VOCABULARY)] * 3, shape)
    return folder


@pytest.fixture(scope="session")
def examples(world_folder: Path):
    from cwdpo.data.read.reader import read_examples

    return read_examples(world_folder / "train.jsonl").examples


@pytest.fixture(scope="session")
def processor(model_folder: Path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def encoder(processor):
    from cwdpo.data.encode.encoder import Encoder

    return Encoder(processor)


@pytest.fixture
def model(model_folder: Path):
    """A fresh copy, with weights far enough from zero that token probabilities differ."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    from random_models import spread

    logging.disable_progress_bar()
    return spread(AutoModelForImageTextToText.from_pretrained(model_folder), seed=3).eval()


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call the entry point in this process, as the shell would."""
    from cwdpo.cli import main as cli

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["cwdpo", *map(str, arguments)])
        code: Any = 0
        capsys.readouterr()  # what was printed before is not this call's
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return call
