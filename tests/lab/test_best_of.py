"""Preference sets whose chosen response is only better: true labels, or those of the noisy judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.files.reading import read_jsonl
from cwdpo.lab.best_of import write_best_of
from cwdpo.lab.spec import BestOf
from cwdpo.models.load import load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.worlds.judged import judge_captions
from cwdpo.worlds.shapes import ShapesSettings, materialise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best-of")
    files = materialise(ShapesSettings(seed=2, train=40, validation=0, test=0, questions=0.0), folder)
    return Path(files["train"])


@pytest.mark.parametrize("worse", ["truth", "judge"])
def test_labels_are_wrong_only_where_the_noisy_judge_gives_them(
    source: Path, tmp_path: Path, worse: str
) -> None:
    policy = load_policy(ModelSettings(path="embedded"))
    encoder = Encoder(policy.processor)
    settings = BestOf(n=3, noise=0.9, worse=worse)  # type: ignore[arg-type]
    counts = write_best_of(policy, encoder, source, tmp_path, settings, seed=1)
    examples = read_examples(tmp_path / "train.jsonl").examples
    chosen = [j.score for j in judge_captions(examples, [e.chosen.text for e in examples])]
    rejected = [j.score for j in judge_captions(examples, [e.rejected[0].text for e in examples])]
    wrong = sum(r > c for r, c in zip(rejected, chosen, strict=True)) / len(examples)
    assert counts["wrong_labels"] == pytest.approx(wrong)
    assert wrong == 0 if worse == "truth" else wrong > 0.1
    rows = read_jsonl(tmp_path / "train.jsonl")
    assert [r["best_of"]["rejected_score"] for r in rows] == pytest.approx(rejected, abs=1e-4)
