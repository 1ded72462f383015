"""The shipped judges, each on cases by hand, and a real `transformers serve` as a judge."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwdpo.errors import DataError, MissingPackageError, ModelError, RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.judging.base import JUDGES
from cwdpo.judging.compare import verdicts
from cwdpo.records import Completion, Example, ImageRef, Message
from cwdpo.worlds.shapes import Scene
from cwdpo.worlds.shapes import judge as judge_text
from fake_server import Fake, says, to
from reward_folder import write_reward_model
from server import needs_server

openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="pip install 'cwdpo[server]'")


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


def example(number: int, **extra: Any) -> Example:
    return Example(
        str(number),
        (),
        (Message("user", ("What is it?",)),),
        Completion("a dog"),
        references=("a dog",),
        extra=extra,
    )


# --- judges ---------------------------------------------------------------------------------------------


def test_the_world_s_judge(examples: list[Example]) -> None:
    rows = [e for e in examples if e.prompt_text.startswith("describe")][:4]
    right = [e.chosen.text for e in rows]
    wrong = [e.rejected[0].text for e in rows]
    judge = JUDGES.build("world")
    assert verdicts(judge, rows, right, wrong) == ["win"] * 4
    assert verdicts(judge, rows, wrong, right) == ["loss"] * 4
    assert verdicts(judge, rows, right, right) == ["tie"] * 4
    with pytest.raises(DataError, match="scene: missing"):
        verdicts(judge, [example(0)], ["a"], ["b"])
    with pytest.raises(DataError, match="scene: missing"):
        judge.check([*rows, example(0)])


def test_the_world_calls_right_what_is_right_in_every_fact(examples: list[Example]) -> None:
    rows = [e for e in examples if e.prompt_text.startswith("describe")]
    rows, texts = zip(
        *[(e, t) for e in rows for t in (e.chosen.text, *(c.text for c in e.rejected))], strict=True
    )
    truth = [judge_text(t, Scene.from_json(e.extra["scene"])) for e, t in zip(rows, texts, strict=True)]
    right = JUDGES.build("world").right(rows, texts)
    assert right == [j.all_correct for j in truth]
    assert {True, False} == set(right)
    half = JUDGES.build({"name": "world", "threshold": 0.5}).right(rows, texts)
    assert half == [j.score >= 0.5 for j in truth]
    assert right != half


def test_a_metric_as_a_judge() -> None:
    rows = [example(i) for i in range(3)]
    judge = JUDGES.build({"name": "metric", "metric": "length"})
    assert verdicts(judge, rows, ["a b c", "a", "a b"], ["a b", "a b", "a b"]) == ["win", "loss", "tie"]
    shorter = JUDGES.build({"name": "metric", "metric": {"name": "chair"}, "figure": "chair_s"})
    shown = [example(i, objects=["dog"]) for i in range(2)]
    assert verdicts(shorter, shown, ["a dog", "a cat"], ["a cat", "a cat"]) == ["win", "tie"], (
        "lower is better"
    )
    with pytest.raises(DataError, match=r"'nothing' cannot score single responses; known: words"):
        JUDGES.build({"name": "metric", "metric": "length", "figure": "nothing"}).right(rows, ["a"] * 3)


def test_a_metric_says_right_by_its_threshold_or_against_chosen() -> None:
    rows, texts = [example(i) for i in range(3)], ["a b c", "a", "a b"]
    assert JUDGES.build({"name": "metric", "metric": "length"}).right(rows, texts) == [True, False, True]
    long = JUDGES.build({"name": "metric", "metric": "length", "threshold": 3})
    assert long.right(rows, texts) == [True, False, False]
    # Lower is better: at most 0 hallucinated captions is a threshold of -0.
    clean = JUDGES.build({"name": "metric", "metric": "chair", "figure": "chair_s", "threshold": 0})
    shown = [example(i, objects=["dog"]) for i in range(2)]
    assert clean.right(shown, ["a dog", "a cat"]) == [True, False]


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [
        ("token_ece", "it needs tokens of the model, but a judge gets texts only"),
        ("multiple_choice", "it needs options of the model"),
        ("lenght", "unknown metric 'lenght'; did you mean 'length'"),
        ({"name": "chair", "synonims": "x"}, "unknown key 'synonims'; did you mean 'synonyms'"),
    ],
)
def test_a_metric_that_cannot_judge_is_refused_with_the_settings(metric: Any, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        JUDGES.build({"name": "metric", "metric": metric})


def test_likeness_to_references() -> None:
    one = Example(
        "a",
        (),
        (Message("user", ("q",)),),
        Completion("a red dog runs"),
        references=("one red dog is running",),
    )
    texts = ["a red dog runs", "one red dog is running", "two blue cars"]
    judge = JUDGES.build({"name": "references", "threshold": 0.7})
    assert judge.right([one] * 3, texts) == [True, True, False]
    assert verdicts(judge, [one] * 3, texts, ["two blue cars", "a red dog runs", "a red dog"]) == [
        "win",
        "tie",
        "loss",
    ]
    bare = Example("b", (), one.prompt, one.chosen, where="data.jsonl:3")
    with pytest.raises(DataError, match=r"data\.jsonl:3: references: missing; the judge references compares"):
        judge.check([one, bare])


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("reward"))


def test_a_reward_model_from_a_folder(reward_folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    rows = [example(i) for i in range(3)]
    judge = JUDGES.build({"name": "reward_model", "path": str(reward_folder), "batch_size": 2})
    ours, theirs = ["a dog", "a cat is a cat", "a dog"], ["a cat", "a dog", "a dog"]

    def reward(text: str) -> float:
        ids = tokenizer(f"What is it?\n{text}", return_tensors="pt")
        with torch.no_grad():
            return float(model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits)

    expected = [
        "win" if reward(a) > reward(b) + 1e-6 else "loss" if reward(b) > reward(a) + 1e-6 else "tie"
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert verdicts(judge, rows, ours, theirs) == expected
    assert expected[2] == "tie"
    assert set(expected[:2]) <= {"win", "loss"}
    for texts in (ours, theirs):
        assert judge.right(rows, texts) == [reward(t) >= reward("a dog") - 1e-6 for t in texts]
    limit = (reward("a dog") + reward("a cat")) / 2
    strict = JUDGES.build({"name": "reward_model", "path": str(reward_folder), "threshold": limit})
    assert strict.right(rows, theirs) == [reward(t) >= limit for t in theirs]


def test_equal_responses_tie_whatever_they_are_batched_with(reward_folder: Path) -> None:
    judge = JUDGES.build({"name": "reward_model", "path": str(reward_folder), "batch_size": 3})
    rows, long = [example(i) for i in range(6)], "a dog is a dog " * 6
    texts = [text for text in ("a dog", long, "a cat", long, "a", "good bad") for _ in range(2)]
    scores = judge.scores(rows, [texts[2 * i : 2 * i + 2] for i in range(6)])
    assert all(a == b for a, b in scores)


def test_a_reward_model_is_loaded_once_and_refused_by_name(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    loaded: list[str] = []
    load = AutoModelForSequenceClassification.from_pretrained

    def counted(source: str, **options: Any) -> Any:
        loaded.append(source)
        return load(source, **options)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", counted)
    judge = JUDGES.build({"name": "reward_model", "path": str(reward_folder)})
    assert loaded == [], "settings are light"
    for _ in range(3):
        judge.right([example(0)], ["a cat"])
    assert loaded == [str(reward_folder)]
    with pytest.raises(ModelError, match=r"reward model .*nothing' cannot be loaded"):
        JUDGES.build({"name": "reward_model", "path": str(tmp_path / "nothing")}).right([example(0)], ["a"])


# --- a model on a server ----------------------------------------------------------------------------------


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
    from cwdpo.completions_api import Reply
    from cwdpo.remote import Client

    asked: list[str] = []

    def answer(self: Client, asks: Any, progress: Any = None) -> list[Reply]:
        asked.extend(a.messages[0].parts[-1] for a in asks)

        # Prefers the longer response; is biased to A where they are alike; cannot decide about "odd".
        def one(text: str) -> str:
            a, b = (text.split(f"Response {x}: ")[1].split("\n")[0] for x in "AB")
            return "hm" if "odd" in a + b else "A" if len(a) >= len(b) else "B"

        return [Reply(one(a.messages[0].parts[-1]), True) for a in asks]

    monkeypatch.setattr(Client, "ask", answer)
    judge = JUDGES.build({"name": "vlm", "server": {"base_url": "http://localhost:1/v1", "model": "m"}})
    rows = [example(i) for i in range(4)]
    ours, theirs = ["long one", "x", "same", "odd"], ["short", "longer", "same", "y"]
    assert verdicts(judge, rows, ours, theirs, store=tmp_path) == ["win", "loss", "tie", "bad"]
    assert len(asked) == 8
    assert asked[0].index("long one") < asked[0].index("short")
    assert asked[4].index("short") < asked[4].index("long one")
    transcript = read_jsonl(tmp_path / "transcript.jsonl")
    assert transcript[2] == {
        "id": "2", "prompt": "What is it?", "ours": "same", "theirs": "same", "ours_first": "A", "theirs_first": "A",
        "verdict": "tie",
    }  # fmt: skip
    verdicts(judge, rows, ours, theirs, store=tmp_path)
    assert len(read_jsonl(tmp_path / "transcript.jsonl")) == 4, "judged again, a pair is listed once"
    pairs = list(zip(ours, theirs, strict=True))
    assert judge.estimate(rows, pairs).startswith("7 requests"), "equal ones are sent once"


@openai
def test_three_candidates_meet_each_other(serve: Callable[..., Fake], tmp_path: Path) -> None:
    rank = {"best": 2, "middle": 1, "worst": 0}

    def answer(text: str) -> str:
        a, b = (text.split(f"Response {x}: ")[1].split("\n")[0] for x in "AB")
        if "odd" in (a, b):
            return "I cannot tell"
        return "A" if rank[a] > rank[b] else "B" if rank[b] > rank[a] else "T"

    server = serve(says(answer))
    judge = JUDGES.build({"name": "vlm", "server": to(server).model_dump()})
    rows = [example(i) for i in range(4)]
    candidates = [["worst", "best", "middle"], ["middle"], ["odd", "best", "worst"], ["odd", "best"]]
    assert judge.scores(rows, candidates, store=tmp_path) == [
        [0.0, 1.0, 0.5],  # beats 0, 2 and 1 of 2
        [None],  # met nobody
        [None, 1.0, 0.0],  # the pairs with "odd" could not be read
        [None, None],
    ]
    assert len(server.seen) == 2 * 5, "both orders of five different pairs"
    assert len(read_jsonl(tmp_path / "transcript.jsonl")) == 7


@openai
def test_right_or_wrong_by_a_question_of_its_own(serve: Callable[..., Fake], tmp_path: Path) -> None:
    words = {"a cat": "Yes.", "a dog": "No", "a cow": "Hard to say"}

    def answer(text: str) -> str:
        return next(v for k, v in words.items() if f"Other response: {k}\n" in text)

    server = serve(says(answer))
    judge = JUDGES.build({"name": "vlm", "server": to(server, concurrency=1).model_dump()})
    one = Example("a", (ImageRef(data=PIXEL),), (Message("user", (None, "What?")),), Completion("a kitten"))
    assert judge.right([one] * 3, list(words), store=tmp_path) == [True, False, None]
    assert len(read_jsonl(tmp_path / "answers.jsonl")) == 3
    assert judge.right([one] * 3, list(words), store=tmp_path) == [True, False, None]
    assert len(server.seen) == 3, "stored answers are not asked for again"
    for _ in range(2):
        assert judge.right([one], ["a cat"]) == [True]
    assert len(server.seen) == 4, "without a folder answers are kept for as long as the judge"


def test_without_the_client_s_package_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = JUDGES.build({"name": "vlm", "server": {"base_url": "http://localhost:1/v1", "model": "m"}})
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackageError, match=r"judge vlm needs the package 'openai'.*cwdpo\[server\]"):
        judge.check([example(0)])


JUDGING = """
import sys
from pathlib import Path
from cwdpo.data.read.reader import read_examples
from cwdpo.judging.base import JUDGES
from cwdpo.judging.compare import verdicts
url, model, data, store = sys.argv[1:]
rows = read_examples(data).examples[:8]
judge = JUDGES.build({"name": "vlm", "server": {"base_url": url, "model": model, "concurrency": 1}})
print(*verdicts(judge, rows, [e.chosen.text for e in rows], [e.rejected[0].text for e in rows], store=Path(store)))
"""


@pytest.mark.slow
@needs_server
def test_a_real_server_is_asked_about_several_candidates_and_about_one(
    served: str, tmp_path: Path, examples: list[Example]
) -> None:
    """As below, no answer can be read: there is no score, nothing is right or wrong, and everything is on record."""
    from cwdpo.models.load import EMBEDDED

    rows = [e for e in examples if e.prompt_text.startswith("describe")][:2]
    server = {"base_url": served, "model": str(EMBEDDED), "concurrency": 1}
    judge = JUDGES.build({"name": "vlm", "server": server})
    candidates = [[e.chosen.text, e.rejected[0].text, e.rejected[1].text] for e in rows]
    assert judge.scores(rows, candidates, store=tmp_path) == [[None] * 3] * 2
    assert judge.right(rows, [e.chosen.text for e in rows], store=tmp_path) == [None] * 2
    transcript = read_jsonl(tmp_path / "transcript.jsonl")
    assert [row["verdict"] for row in transcript] == ["bad"] * 6
    answers = read_jsonl(tmp_path / "answers.jsonl")
    assert len(answers) == 2 * 6 + 2
    assert {row[k] for row in transcript for k in ("ours_first", "theirs_first")} <= {
        a["text"] for a in answers
    }


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
