"""Captions under several decodings: entropy by hand, the search for a temperature, and the figures of a small model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cwdpo.data.encode.encoder import Encoder
from cwdpo.data.read.reader import read_examples
from cwdpo.lab.captions import captions, sampled_entropy, temperature_at, tempered_entropy
from cwdpo.lab.cell import tail
from cwdpo.lab.spec import Decodings
from cwdpo.models.load import load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.worlds.shapes import ShapesSettings, materialise


def test_entropy_of_a_tempered_distribution_by_hand() -> None:
    """Two tokens with odds 4 to 1; at temperature 2 the odds are 2 to 1."""
    logp = torch.tensor([[0.8, 0.2]]).log()
    token = torch.zeros(1, dtype=torch.long)
    for temperature, p in ((1.0, 4 / 5), (2.0, 2 / 3)):
        by_hand = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert tempered_entropy(temperature)(logp, token).item() == pytest.approx(by_hand, abs=1e-6)


def test_the_temperature_of_an_entropy_is_found() -> None:
    """Two tokens whose logits differ by 3: H(T) = log(1 + e^(-3/T)) + (3/T) / (1 + e^(3/T))."""

    def entropy(temperature: float) -> float:
        x = 3 / temperature
        return math.log1p(math.exp(-x)) + x / (1 + math.exp(x))

    for wanted in (0.5, 0.9, 1.3, 2.7):
        assert temperature_at(entropy(wanted), entropy) == pytest.approx(wanted, rel=0.05)
    assert temperature_at(entropy(1.0), entropy) == 1.0, "nothing is searched where it is right at once"


def test_the_tail_of_gradient_norms() -> None:
    """Of 101 even values from 1 to 3 the 95th percentile is 2.9, and the median 2."""
    assert tail([1 + 0.02 * k for k in range(101)]) == pytest.approx(2.9 / 2)
    assert tail([1.0]) is None
    assert tail([0.0, 0.0]) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("captions")
    files = materialise(ShapesSettings(seed=3, train=0, validation=0, test=24, questions=0.0), folder)
    policy = load_policy(ModelSettings(path="embedded"))
    return policy.model, Encoder(policy.processor), read_examples(Path(files["test"])).examples


@pytest.mark.slow
def test_hotter_samples_have_more_entropy_and_fewer_right_captions(world) -> None:
    model, encoder, test = world
    model.train()
    cold, warm, hot = (sampled_entropy(model, encoder, test, t) for t in (0.7, 1.0, 1.5))
    assert 0 < cold < warm < hot < math.log(412)
    assert model.training, "the mode is restored"
    model.eval()
    figures = captions(model, encoder, test, Decodings(temperatures=(1.5,), same_entropy=True), hot)
    assert figures["temperature@entropy"] == pytest.approx(1.5, rel=0.02)
    assert figures["judge_score@1.5"] < figures["judge_score"]
    assert figures["judge_score@entropy"] == pytest.approx(figures["judge_score@1.5"], abs=0.1)
    for name, by_picture in figures["pictures"].items():
        assert len(by_picture) == len(test)
        assert sum(by_picture) / len(by_picture) == pytest.approx(figures[name], abs=1e-4), name
    means = [sum(own) / len(own) for own in figures["scores"]]
    assert means == pytest.approx(figures["pictures"]["judge_score"], abs=2e-4)
    plain = captions(model, encoder, test)
    assert {key for key in figures if "@" not in key} - set(plain) == {"greedy_score"}
