"""Ids of the hub: what is read, and what is said of an id that cannot be read; against a stand-in on loopback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from cwdpo.config import load_recipe
from cwdpo.data.read.reader import read_examples
from cwdpo.errors import DataError, ModelError
from cwdpo.hub import HubData, check_hub, hub_data
from cwdpo.models.packages import check_packages
from cwdpo.models.settings import ModelSettings
from fake_hub import Hub

CARD = """---
configs:
- config_name: english
  data_files:
  - {split: train, path: english/train.parquet}
  - {split: test, path: english/test.parquet}
- config_name: dutch
  data_files:
  - {split: train, path: dutch/train.parquet}
---
"""


def table(*answers: str) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    rows = [
        {
            "images": [{"bytes": picture.getvalue(), "path": None}],
            "prompt": "<image>Q",
            "chosen": one,
            "rejected": "no",
        }
        for one in answers
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def pairs(hub: Hub) -> Hub:
    one = {"README.md": CARD.encode(), "dutch/train.parquet": table("ja")}
    one |= {"english/train.parquet": table("yes", "sure"), "english/test.parquet": table("right")}
    hub.add("datasets", "someone/pairs", one)
    hub.add("datasets", "someone/pairs", {**one, "dutch/train.parquet": table("jawel")}, "v2")
    hub.add("datasets", "someone/plain", {"data/train-00000-of-00001.parquet": table("plain")})
    return hub


@pytest.mark.parametrize(
    ("address", "chosen"),
    [
        ("someone/plain", ["plain"]),
        ("someone/plain#train", ["plain"]),
        ("someone/pairs:english", ["yes", "sure"]),
        ("someone/pairs:english#test", ["right"]),
        ("someone/pairs:english#train[1:]", ["sure"]),
        ("someone/pairs:dutch", ["ja"]),
        ("someone/pairs@v2:dutch", ["jawel"]),
    ],
)
def test_configuration_split_and_revision(pairs: Hub, address: str, chosen: list[str]) -> None:
    found = read_examples(address).examples
    assert [one.chosen.text for one in found] == chosen
    assert found[0].images[0].open().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "someone/pears",
            r"'someone/pears': .* has no such data set; did you mean 'someone/pairs'\? correct",
        ),
        ("nobody/pairs", r"the hub has no such data set; correct the name; or, if it is private, log in"),
        (
            "someone/pairs@v3:dutch",
            r"'someone/pairs': .* no revision 'v3' of it: name a branch, tag or commit",
        ),
        (
            "someone/pairs",
            r"it has the configurations (english, dutch|dutch, english): name one, as in owner",
        ),
        ("someone/pairs:frisian", r"someone/pairs:frisian: it has the configurations "),
        ("someone/pairs:dutch#test", r"someone/pairs:dutch#test: it has the splits train: name one"),
    ],
)
def test_what_the_hub_lacks_is_said_in_one_line(pairs: Hub, address: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        read_examples(address)
    assert "\n" not in str(error.value)


def test_a_model_of_the_hub(hub: Hub, model_folder: Path) -> None:
    hub.add("models", "someone/tiny-llava", model_folder)
    check_packages(ModelSettings(path="someone/tiny-llava"))
    with pytest.raises(ModelError, match=r"no such model; did you mean 'someone/tiny-llava'\?"):
        check_packages(ModelSettings(path="someone/tiny-lava"))
    with pytest.raises(ModelError, match=r"but no revision 'v9' of it"):
        check_packages(ModelSettings(path="someone/tiny-llava", revision="v9"))
    hub.gated.add("someone/tiny-llava")
    with pytest.raises(
        ModelError, match=r"accepted its terms: accept them on http.*/someone/tiny-llava, and log"
    ):
        check_hub("someone/tiny-llava", "models", "main", ModelError)


def test_a_hub_that_does_not_answer_is_said_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for kind, error in (("models", ModelError), ("datasets", DataError)):
        with pytest.raises(error, match=r"'a/b': .* does not answer \(ConnectError\): .* HF_HUB_OFFLINE=1"):
            check_hub("a/b", kind, None, error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub("a/b", "models", None, ModelError)
    assert not hub.asked


def test_the_recipe_on_a_set_of_the_hub_names_both_splits() -> None:
    data = load_recipe("qwen2_5_vl_3b_rlaifv").data
    places = [hub_data(str(path)) for path in (data.path, data.validation_path)]
    assert places == [HubData("HuggingFaceH4/rlaif-v_formatted", split=split) for split in ("train", "test")]


@pytest.mark.parametrize("text", ["a", "a/b/c", "./a/b", "a/b#", "a/b:", "a/b@", "a b/c"])
def test_what_is_no_address(text: str) -> None:
    assert hub_data(text) is None


def test_a_registry_of_llamafactory_names_subset_revision_and_split(pairs: Hub, tmp_path: Path) -> None:
    registry = {
        "nl": {"hf_hub_url": "someone/pairs", "subset": "dutch", "revision": "v2", "ranking": True},
        "test": {"hf_hub_url": "someone/pairs", "subset": "english", "split": "test", "ranking": True},
        "file": {"file_name": "x.json", "subset": "english"},
    }
    for entry in registry.values():
        entry["columns"] = {
            "prompt": "prompt",
            "chosen": "chosen",
            "rejected": "rejected",
            "images": "images",
        }
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    (tmp_path / "x.json").write_text("[]")
    for name, chosen in (("nl", "jawel"), ("test", "right")):
        (example,) = read_examples(tmp_path / f"dataset_info.json:{name}").examples
        assert example.chosen.text == chosen
    with pytest.raises(DataError, match="subset = 'english': it belongs to 'hf_hub_url'"):
        read_examples(tmp_path / "dataset_info.json:file")


@pytest.mark.slow
def test_a_run_from_the_hub_alone(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    """Model, training and held-out rows by their ids; the card names the set without its parts."""
    parts = {"train": ("red", "green", "blue", "grey"), "test": ("dark", "pale", "warm", "cold")}
    hub.add("models", "someone/tiny-llava", model_folder)
    files = {f"data/{split}-00000-of-00001.parquet": coloured(words, 6) for split, words in parts.items()}
    hub.add("datasets", "someone/colours", files)
    (tmp_path / "my.yaml").write_text(
        "model: {path: someone/tiny-llava, device: cpu}\n"
        "data: {path: someone/colours#train, validation_path: someone/colours#test}\n"
        "stage1: {steps: 1, objective: sft}\nstage2: {steps: 1}\n"
        "train: {batch_size: 4}\nevaluation: {prompts: 2}\ncalibration: {samples: 2}\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    streamed = ("data.streaming.window=4", "stage2.steps=3")
    for words in (
        ("validate", "my.yaml"), ("train", "my.yaml", "--out", "run"), ("validate", "my.yaml", *streamed),
        ("train", "my.yaml", *streamed, "--out", "streamed"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "cwdpo", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "datasets:\n- someone/colours\n" in card
    assert "base_model: someone/tiny-llava" in card
    windows = (tmp_path / "streamed" / "windows.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in windows] == [0, 0, 1, 2]


def coloured(words: tuple[str, ...], times: int) -> bytes:
    rows = []
    for i in range(len(words) * times):
        picture = io.BytesIO()
        Image.new("RGB", (24, 24), (10 * i, len(words[0]), 90)).save(picture, "PNG")
        rows.append(
            {
                "images": [{"bytes": picture.getvalue(), "path": None}],
                "prompt": "What is there?",
                "chosen": f"a {words[i % 4]} ring",
                "rejected": f"a {words[(i + 1) % 4]} ring",
            }
        )
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()
