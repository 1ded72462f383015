"""Exports and rounds on a real vLLM: equal answers, adapters in and out, a killed server, samples off the policy."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cwdpo.completions_api import Ask
from cwdpo.config import parse_recipe
from cwdpo.data.read.reader import read_examples
from cwdpo.dynamics.diagnose import diagnose
from cwdpo.errors import ServerError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.load import load_policy
from cwdpo.models.sample import sample
from cwdpo.models.settings import ModelSettings
from cwdpo.onpolicy import rounds
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.remote import Client, ServerSettings
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.worlds.shapes import ShapesSettings, materialise
from vllm_server import Vllm

PROMPTS = 40


def recipe(base: Path, url: str, **changes: Any) -> Any:
    tree: dict[str, Any] = {
        "model": {
            "path": str(base), "device": "cpu", "tune": "lora", "lora": {"r": 8, "alpha": 16},
            "freeze": ["vision", "projector"],
        },
        "data": {"world": {"seed": 1, "train": 96, "validation": 16, "test": 0}, "stage1_fraction": 0.3},
        "negatives": {
            "on_policy_fraction": 0.5, "rounds": 3,
            "sampler": {
                "samples": 2, "max_new_tokens": 40, "serve_adapter": True,
                "server": {"base_url": url, "model": "base", "concurrency": 4, "retries": 1},
            },
        },
        "stage1": {"objective": "sft", "learning_rate": 2e-4, "steps": 4},
        "stage2": {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 12},
        "train": {"batch_size": 8, "logging_steps": 2, "save_steps": 4},
        "calibration": {"samples": 24, "max_new_tokens": 40},
        "probes": {"every": 4, "prompts": 8},
        "evaluation": {"prompts": 0},
        "stop": [],
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value}
    return parse_recipe(tree)


def models(vllm: Vllm) -> list[str]:
    with urllib.request.urlopen(f"{vllm.url}/models", timeout=30) as answer:
        return [one["id"] for one in json.load(answer)["data"]]


def readings(folder: Path, name: str) -> dict[int, float]:
    return {row["step"]: row["value"] for row in read_jsonl(folder / "readings.jsonl") if row["name"] == name}


def test_an_export_gives_the_same_answers(base: Path, vllm: Vllm, tmp_path: Path) -> None:
    files = materialise(ShapesSettings(seed=3, train=0, validation=0, test=PROMPTS, questions=0.3), tmp_path)
    examples = read_examples(files["test"]).examples[:PROMPTS]
    asks = [Ask(e.prompt, e.images, max_tokens=40) for e in examples]
    theirs = Client(ServerSettings(base_url=vllm.url, model="base")).ask(asks)
    policy = load_policy(ModelSettings(path=str(base), device="cpu"))
    ours = sample(policy.model, policy.encoder(), examples, temperature=0, max_new_tokens=40)
    assert [(a.text, a.ended) for a in theirs] == [(s.text, s.ended) for s in ours]


def test_three_rounds_sample_the_policy_of_each(base: Path, vllm: Vllm, tmp_path: Path) -> None:
    train_two_stage(recipe(base, vllm.url), tmp_path / "run")
    gaps = readings(tmp_path / "run", "engine_gap")
    assert list(gaps) == [0, 4, 8]
    assert all(0 <= gap < 1e-5 for gap in gaps.values()), gaps
    assert all(share < 0.2 for share in readings(tmp_path / "run", "engine_apart").values())
    for row in read_jsonl(tmp_path / "run" / "rounds.jsonl"):
        assert row["by_origin"]["on_policy"]["n"] > 5
    assert models(vllm) == ["base"], "every adapter was unloaded"
    assert not [f for f in diagnose(RunDir(tmp_path / "run")) if f.name == "off_policy_samples"]


def test_a_server_killed_within_a_round_and_started_again(base: Path, vllm: Vllm, tmp_path: Path) -> None:
    whole = recipe(base, vllm.url)
    train_two_stage(whole, tmp_path / "whole")
    stopped = threading.Event()

    def sampled(round_: int, done: int, total: int) -> None:
        if round_ == 1 and not stopped.is_set():
            stopped.set()
            vllm.kill()

    with pytest.raises(ServerError, match="stored answers are not requested again"):
        train_two_stage(whole, tmp_path / "killed", listener=Listener(sampled=sampled))
    before = [row["key"] for row in read_jsonl(tmp_path / "killed" / "answers.jsonl")]
    vllm.start()
    train_two_stage(whole, tmp_path / "killed", resume=True)
    after = [row["key"] for row in read_jsonl(tmp_path / "killed" / "answers.jsonl")]
    assert after[: len(before)] == before
    assert len(set(after)) == len(after), "no answer was requested twice"
    ends = [readings(tmp_path / name, "engine_gap") for name in ("whole", "killed")]
    assert list(ends[0]) == list(ends[1])
    assert all(gap < 1e-5 for gap in ends[1].values())


def test_samples_of_another_policy_are_a_finding(
    base: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM leaves out the vision tower's and the projector's layers; such an adapter is refused, and would be found."""
    more = {"model": {"freeze": []}, "stage1": {"learning_rate": 2e-2, "steps": 12}}
    with pytest.raises(Exception, match=r"serve_adapter: the adapter has layers of the vision"):
        train_two_stage(recipe(base, vllm.url, **more), tmp_path / "refused")
    monkeypatch.setattr(rounds, "check_served_parts", lambda model: None)
    train_two_stage(recipe(base, vllm.url, **more), tmp_path / "run")
    assert max(readings(tmp_path / "run", "engine_gap").values()) > 0.05
    assert "off_policy_samples" in {f.name for f in diagnose(RunDir(tmp_path / "run"))}
