"""Judges, win rates by kind, Bradley-Terry, and a real `transformers serve` as a judge."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cwdpo.errors import DataError, MissingPackageError
from cwdpo.judging.base import JUDGES, kind_of, strengths, tournament, wins
from cwdpo.judging.win_rate import win_rate
from cwdpo.records import Completion, Example, Message
from cwdpo.rundir import read_jsonl
from server import needs_server

openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="pip install 'cwdpo[server]'")


def example(number: int, **extra: Any) -> Example:
    return Example(
        str(number),
        (),
        (Message("user", ("What is it?",)),),
        Completion("a dog"),
        references=("a dog",),
        extra=extra,
    )


# --- counting -------------------------------------------------------------------------------------------


def test_wins_by_kind_by_hand() -> None:
    rows = [example(i, kind="colour" if i < 3 else "count") for i in range(5)]
    found = wins(rows, ["win", "loss", "bad", "win", "tie"])
    assert (found["all"]["win"], found["all"]["tie"], found["all"]["loss"]) == (2 / 5, 2 / 5, 1 / 5)
    assert found["all"]["rate"] == pytest.approx(3 / 5)
    assert found["all"]["bad_answers"] == 1
    assert found["colour"]["rate"] == pytest.approx(0.5)
    assert (found["colour"]["n_prompts"], found["colour"]["bad_answers"]) == (3, 1)
    assert found["count"]["rate"] == pytest.approx(0.75)
    assert set(wins(rows[:3], ["win", "tie", "loss"])) == {"all"}, "one kind needs no rows of its own"


def test_samples_of_a_prompt_are_one_prompt() -> None:
    rows = [example(i // 2) for i in range(6)]
    found = wins(rows, ["win", "loss", "win", "win", "loss", "loss"])["all"]
    theirs = win_rate([[1, 0], [1, 1], [0, 0]], [[0.5, 0.5]] * 3)
    assert (found["rate"], found["low"], found["high"], found["n_prompts"]) == (
        theirs.rate,
        theirs.low,
        theirs.high,
        3,
    )


def test_kinds_of_the_world() -> None:
    scene = example(0, scene={})
    assert kind_of(scene) == "question"
    assert kind_of(example(1, category="art")) == "art"
    assert kind_of(example(1)) == "all"


# --- Bradley-Terry --------------------------------------------------------------------------------------


def test_bradley_terry_finds_the_strengths_that_made_the_games() -> None:
    rng = np.random.default_rng(0)
    truth = {"a": 0.8, "b": 0.0, "c": -0.8}
    worth = {}
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        chance = 1 / (1 + math.exp(truth[other] - truth[one]))
        worth[one, other] = (rng.random(4000) < chance).astype(float).tolist()
    found = {row["name"]: row for row in strengths(list(truth), worth)}
    for name, value in truth.items():
        assert found[name]["value"] == pytest.approx(value, abs=0.08)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert [row["name"] for row in strengths(list(truth), worth)] == ["a", "b", "c"]


def test_bradley_terry_of_two_is_the_log_odds() -> None:
    found = {
        r["name"]: r["value"]
        for r in strengths(["a", "b"], {("a", "b"): [1.0] * 60 + [0.0] * 30 + [0.5] * 10})
    }
    assert found["a"] - found["b"] == pytest.approx(math.log(65 / 35), abs=1e-3)


def test_who_never_lost_has_a_finite_strength() -> None:
    found = strengths(["a", "b", "c"], {("a", "b"): [1.0] * 5, ("a", "c"): [1.0] * 5, ("b", "c"): [1.0] * 5})
    assert all(math.isfinite(r["value"]) for r in found)


def test_without_choix_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(MissingPackageError, match=r"Bradley-Terry .*pip install 'cwdpo\[judge\]'"):
        strengths(["a", "b"], {("a", "b"): [1.0]})


# --- judges ---------------------------------------------------------------------------------------------


def test_the_exact_judge(examples: list[Example]) -> None:
    rows = [e for e in examples if e.prompt_text.startswith("describe")][:4]
    right = [e.chosen.text for e in rows]
    wrong = [e.rejected[0].text for e in rows]
    judge = JUDGES.build("exact")
    assert judge(rows, right, wrong) == ["win"] * 4
    assert judge(rows, wrong, right) == ["loss"] * 4
    assert judge(rows, right, right) == ["tie"] * 4
    with pytest.raises(DataError, match="scene: missing"):
        judge([example(0)], ["a"], ["b"])


def test_a_metric_as_a_judge() -> None:
    rows = [example(i) for i in range(3)]
    judge = JUDGES.build({"name": "metric", "metric": "length"})
    assert judge(rows, ["a b c", "a", "a b"], ["a b", "a b", "a b"]) == ["win", "loss", "tie"]
    shorter = JUDGES.build({"name": "metric", "metric": {"name": "chair"}, "figure": "chair_s"})
    shown = [example(i, objects=["dog"]) for i in range(2)]
    assert shorter(shown, ["a dog", "a cat"], ["a cat", "a cat"]) == ["win", "tie"], "lower is better"
    with pytest.raises(DataError, match=r"'nothing' does not judge single responses; known: words"):
        JUDGES.build({"name": "metric", "metric": "length", "figure": "nothing"})(rows, ["a"] * 3, ["b"] * 3)


def test_a_reward_model_from_a_folder(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from cwdpo.models.tiny import train_tokenizer

    tokenizer = train_tokenizer(["a dog what is it cat good bad"], 300)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2ForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [example(i) for i in range(3)]
    judge = JUDGES.build({"name": "reward_model", "path": str(tmp_path), "batch_size": 2})
    ours, theirs = ["a dog", "a cat is a cat", "a dog"], ["a cat", "a dog", "a dog"]

    def reward(text: str) -> float:
        ids = tokenizer(f"What is it?\n{text}", return_tensors="pt")
        with torch.no_grad():
            return float(
                model.eval()(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
            )

    expected = [
        "win" if reward(a) > reward(b) + 1e-6 else "loss" if reward(b) > reward(a) + 1e-6 else "tie"
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert judge(rows, ours, theirs) == expected
    assert expected[2] == "tie"
    assert set(expected[:2]) <= {"win", "loss"}


def test_a_tournament_of_three(examples: list[Example]) -> None:
    rows = [e for e in examples if e.prompt_text.startswith("describe")][:6]
    texts = {
        "right": [e.chosen.text for e in rows],
        "mixed": [e.chosen.text if i % 2 else e.rejected[0].text for i, e in enumerate(rows)],
        "wrong": [e.rejected[0].text for e in rows],
    }
    found, strength = tournament(list(texts), JUDGES.build("exact"), rows, texts)
    rates = {(r["ours"], r["theirs"]): r["rate"] for r in found}
    assert rates == {("right", "mixed"): 0.75, ("right", "wrong"): 1.0, ("mixed", "wrong"): 0.75}
    assert [s["name"] for s in strength] == ["right", "mixed", "wrong"]


# --- the judge behind a server --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("A", "B", "win"), ("B", "A", "loss"), ("A", "A", "tie"), ("B", "B", "tie"), ("T", "T", "tie"),
        ("A", "tie", "win"), ("T", "A", "loss"), ("a", "b.", "win"), ("**B**", "Response A", "loss"),
        ("a small dog", "A", "bad"), ("", "B", "bad"), ("I think A", "B", "bad"),
    ],
)  # fmt: skip
def test_both_orders_decide(first: str, second: str, verdict: str) -> None:
    from cwdpo.judging.judges.vlm import decide

    assert decide(first, second) == verdict


@openai
def test_both_orders_are_asked_and_the_transcript_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cwdpo.remote import Answer, Client

    asked: list[str] = []

    def answer(self: Client, asks: Any, progress: Any = None) -> list[Answer]:
        asked.extend(a.messages[0].parts[-1] for a in asks)

        # Prefers the longer response; is biased to A where they are alike; cannot decide about "odd".
        def one(text: str) -> str:
            a, b = (text.split(f"Response {x}: ")[1].split("\n")[0] for x in "AB")
            return "hm" if "odd" in a + b else "A" if len(a) >= len(b) else "B"

        return [Answer(one(a.messages[0].parts[-1]), True) for a in asks]

    monkeypatch.setattr(Client, "ask", answer)
    judge = JUDGES.build({"name": "vlm", "server": {"base_url": "http://localhost:1/v1", "model": "m"}})
    rows = [example(i) for i in range(4)]
    ours, theirs = ["long one", "x", "same", "odd"], ["short", "longer", "same", "y"]
    assert judge(rows, ours, theirs, store=tmp_path) == ["win", "loss", "tie", "bad"]
    assert len(asked) == 8
    assert asked[0].index("long one") < asked[0].index("short")
    assert asked[4].index("short") < asked[4].index("long one")
    transcript = read_jsonl(tmp_path / "transcript.jsonl")
    assert transcript[2] == {
        "id": "2", "prompt": "What is it?", "ours": "same", "theirs": "same", "ours_first": "A", "theirs_first": "A",
        "verdict": "tie",
    }  # fmt: skip
    judge(rows, ours, theirs, store=tmp_path)
    assert len(read_jsonl(tmp_path / "transcript.jsonl")) == 4, "judged again, a pair stands there once"
    assert judge.estimate(rows, ours, theirs, None).startswith("7 requests"), "equal ones are sent once"


JUDGING = """
import sys
from pathlib import Path
from cwdpo.data.read.reader import read_examples
from cwdpo.judging.base import JUDGES
url, model, data, store = sys.argv[1:]
rows = read_examples(data).examples[:8]
judge = JUDGES.build({"name": "vlm", "server": {"base_url": url, "model": model, "concurrency": 1}})
print(*judge(rows, [e.chosen.text for e in rows], [e.rejected[0].text for e in rows], store=Path(store)))
"""


@pytest.mark.slow
@needs_server
def test_a_real_server_is_asked_in_both_orders_and_resumed_after_a_kill(
    served: str, tmp_path: Path, world_folder: Path
) -> None:
    """The small LLaVA describes pictures whatever it is asked, so every answer is bad, and is counted as that."""
    from cwdpo.models.load import EMBEDDED

    store = tmp_path / "judge"
    command = [
        sys.executable,
        "-c",
        JUDGING,
        served,
        str(EMBEDDED),
        str(world_folder / "train.jsonl"),
        str(store),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        first = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    while len(read_jsonl(store / "answers.jsonl")) < 5:
        assert first.poll() is None, log.read_text(errors="replace")
        time.sleep(0.02)  # waits for the judge, not for a duration
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = (store / "answers.jsonl").read_bytes()
    assert len(read_jsonl(store / "answers.jsonl")) < 16
    whole = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    answers = read_jsonl(store / "answers.jsonl")
    assert len({row["key"] for row in answers}) == len(answers) == 16, (
        "8 pairs in two orders, none asked twice"
    )
    assert (store / "answers.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]), (
        "what came is kept"
    )
    transcript = read_jsonl(store / "transcript.jsonl")
    assert len(transcript) == 8
    assert whole.stdout.split() == [row["verdict"] for row in transcript]
    assert {row["verdict"] for row in transcript} <= {"win", "tie", "loss", "bad"}
    # A third run is answered from the store, without the server.
    again = subprocess.run(
        [*command[:3], "http://127.0.0.1:9/v1", *command[4:]],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert again.returncode != 0, "another server is another judge"
    third = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert third.stdout == whole.stdout
    assert len(read_jsonl(store / "answers.jsonl")) == 16
    print(json.dumps([row["verdict"] for row in transcript]))
