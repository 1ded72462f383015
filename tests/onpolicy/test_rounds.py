"""Rounds of stage 2: shares, fresh samples, the reference that stays, kills anywhere, and one process like two."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.config import parse_recipe
from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, EncodedPrompt, Encoder
from cwdpo.errors import DataError, RecipeError
from cwdpo.files.reading import read_jsonl
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.onpolicy.blend import blend
from cwdpo.onpolicy.plan import RoundPlan
from cwdpo.onpolicy.rounds import RoundData
from cwdpo.onpolicy.samples import PromptSamples, Sorted, degenerate, sort_samples
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.records import Completion, Example, Message, Sample
from cwdpo.stage import reference
from cwdpo.stage.listener import Listener
from cwdpo.trainer.weights import Weights
from launch import launch

TREE: dict[str, Any] = {
    "name": "rounds",
    "model": {"path": "embedded", "device": "cpu", "freeze": ["vision"]},
    "data": {"world": {"seed": 5, "train": 50, "validation": 12, "test": 0}, "stage1_fraction": 0.2},
    "negatives": {"on_policy_fraction": 0.5, "rounds": 3, "sampler": {"batch_size": 6, "max_new_tokens": 40}},
    "stage1": {"objective": {"name": "sft"}, "learning_rate": 1e-4, "steps": 2},
    "stage2": {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 15},
    "train": {"batch_size": 4, "logging_steps": 1, "save_steps": 3, "warmup_steps": 2},
    "calibration": {"samples": 12, "max_new_tokens": 30},
    "probes": {"every": 5, "prompts": 8},
    "evaluation": {"prompts": 0},
    "stop": [],  # at these learning rates the default rule would end every run in its first round
}


class Killed(BaseException):
    """Stands in for a kill."""


def recipe(**changes: Any) -> Any:
    tree = json.loads(json.dumps(TREE))
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_recipe(tree)


def train(folder: Path, listener: Listener | None = None, *, resume: bool = False, **changes: Any) -> Path:
    train_two_stage(recipe(**changes), folder, resume=resume, listener=listener)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("rounds") / "run")


# --- what a run with rounds does ------------------------------------------------------------------------


def test_every_round_has_fresh_samples_and_the_asked_share(whole: Path) -> None:
    rounds = read_jsonl(whole / "rounds.jsonl")
    assert [(r["round"], r["step"], r["end"]) for r in rounds] == [(0, 0, 5), (1, 5, 10), (2, 10, 15)]
    for r in rounds:
        n = sum(v["n"] for v in r["by_origin"].values())
        assert abs(r["realised"] - 0.5) <= 0.5 / n + 1e-9
        assert r["by_origin"]["on_policy"]["n"] == round(r["realised"] * n)
        assert r["judged"]
    pool = read_jsonl(whole / "pool.jsonl")
    assert {r["step"] for r in pool} == {0, 5, 10}
    again = {r["id"]: [s["text"] for s in r["samples"]] for r in pool if r["round"] == 0}
    both = [r for r in pool if r["round"] == 2 and r["id"] in again]
    assert both
    assert any([s["text"] for s in r["samples"]] != again[r["id"]] for r in both)


def test_samples_of_this_process_agree_with_training(whole: Path) -> None:
    """Sampling and scoring are different code: the same tokens have the same log-probabilities."""
    found = [row for row in read_jsonl(whole / "readings.jsonl") if row["name"].startswith("engine_")]
    assert [(row["name"], row["step"]) for row in found] == [
        (name, step) for step in (0, 5, 10) for name in ("engine_gap", "engine_apart")
    ]
    for row in found:
        assert row["n"] > 5
        # Some texts of this hot little model are not encoded as the tokens that were drawn.
        assert 0 <= row["value"] < (1e-5 if row["name"] == "engine_gap" else 0.4), row


def test_negatives_are_samples_that_the_judge_found_wrong(whole: Path) -> None:
    from cwdpo.worlds.shapes import Scene, judge

    scenes = {r["id"]: Scene.from_json(r["scene"]) for r in read_jsonl(whole / "data" / "train.jsonl")}
    pairs = [p for r in read_jsonl(whole / "rounds.jsonl") for p in r["pairs"] if p["origin"] == "on_policy"]
    assert len(pairs) > 9
    assert not any(judge(p["rejected"], scenes[p["id"]]).all_correct for p in pairs)
    right = Counter(s["right"] for r in read_jsonl(whole / "pool.jsonl") for s in r["samples"])
    assert right[True] > 5
    assert right[False] > 5


def test_metrics_tell_share_likelihood_and_weight_by_origin(whole: Path) -> None:
    rows = [r for r in read_jsonl(whole / "metrics.jsonl") if r["stage"] == "stage2"]
    for row in rows:
        n = {o: row[f"negatives/{o}/n"] for o in ("dataset", "on_policy")}
        assert sum(n.values()) == 4
        assert row["negatives/on_policy/share"] == n["on_policy"] / 4
        parts = [
            n[o] * row[f"negatives/{o}/{name}"]
            for name in ("weight", "logps_mean") for o in n if n[o]
        ]  # fmt: skip
        whole_weight, whole_logp = row["cooling/weight_mean"], row["logps_mean/rejected"]
        assert sum(parts) == pytest.approx(4 * (whole_weight + whole_logp), abs=1e-4)


def test_the_reference_stays_that_of_the_stages_start(whole: Path) -> None:
    """Reference values of the last round against a fresh load of stage 1's model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from cwdpo.data.encode.encoder import Encoder
    from cwdpo.data.read.reader import read_examples
    from cwdpo.models.shared_attention import use_scoring
    from cwdpo.scoring.pairs import reference_pass
    from cwdpo.scoring.reference_cache import read_file, reference_digest, row_keys

    encoder = Encoder(AutoProcessor.from_pretrained(whole / "stage1" / "model"))
    model = AutoModelForImageTextToText.from_pretrained(whole / "stage1" / "model")
    examples = {e.id: e for e in read_examples(whole / "data" / "train.jsonl").examples}
    last = read_jsonl(whole / "rounds.jsonl")[-1]
    batches = [batch for path in (whole / "reference").glob("*.arrow") for batch in read_file(path)]
    stored = {key: value for batch in batches for key, value in zip(*batch, strict=True)}
    use_scoring(model, "auto")
    digest = reference_digest(model)
    for pair in last["pairs"]:
        example = examples[pair["id"]]
        own = (Completion(pair["rejected"]),)
        encoded = encoder.encode(Example(**{**vars(example), "rejected": own}))
        scored = reference_pass(model, [encoded])[0]
        completions = (scored.chosen, *scored.negatives)
        for key, completion in zip(row_keys(digest, scored), completions, strict=True):
            assert stored[key][0] == pytest.approx(completion.reference_sum_logp, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_none_and_all(tmp_path: Path, fraction: float) -> None:
    short = {"objective": {"name": "cw_dpo"}, "learning_rate": 1e-4, "steps": 4}
    negatives = {"on_policy_fraction": fraction, "rounds": 2, "sampler": {"max_new_tokens": 40}}
    folder = train(tmp_path / "run", stage2=short, negatives=negatives)
    assert [r["realised"] for r in read_jsonl(folder / "rounds.jsonl")] == [fraction] * 2
    assert (folder / "pool.jsonl").is_file() == (fraction > 0)


@pytest.mark.slow
def test_right_samples_become_chosen_where_asked(tmp_path: Path) -> None:
    short = {"objective": {"name": "sft"}, "learning_rate": 1e-4, "steps": 4}
    negatives = {
        "on_policy_fraction": 0.0,
        "rounds": 1,
        "on_policy_chosen": True,
        "sampler": {"max_new_tokens": 40},
    }
    folder = train(tmp_path / "run", stage2=short, negatives=negatives)
    (row,) = read_jsonl(folder / "rounds.jsonl")
    pool = {r["id"]: r["samples"] for r in read_jsonl(folder / "pool.jsonl")}
    judged_right = {i for i, samples in pool.items() if any(s["right"] for s in samples)}
    assert 0 < row["replaced_chosen"] <= len(judged_right)
    for pair in row["pairs"]:
        if pair["chosen_origin"] == "on_policy":
            assert pair["chosen"] in [s["text"] for s in pool[pair["id"]] if s["right"]]


# --- kills ----------------------------------------------------------------------------------------------


def killer(where: str, at: tuple[int, int]) -> Listener:
    """Ends the run while round at[0] is sampled and at[1] completions are done, or behind step at[1]."""

    def sampled(round_: int, done: int, total: int) -> None:
        if where == "sampling" and (round_, done) == at:
            raise Killed

    def step(stage: str, done: int, total: int) -> None:
        if where == "step" and (stage, done) == (f"stage{at[0]}", at[1]):
            raise Killed

    return Listener(step=step, sampled=sampled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("sampling", (0, 24)),
        ("sampling", (1, 48)),
        ("sampling", (2, 24)),
        ("step", (2, 3)),
        ("step", (2, 8)),
        ("step", (2, 10)),
    ],
)
def test_a_kill_in_sampling_or_in_a_round_changes_nothing(
    where: str, at: tuple[int, int], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(folder, killer(where, at))
    pool = folder / "pool.jsonl"
    if where == "sampling":  # the kill also cut the line that was being written
        pool.write_bytes(pool.read_bytes() + pool.read_bytes().splitlines(keepends=True)[-1][:-40])
    train(folder, resume=True)
    for name in ("pool.jsonl", "rounds.jsonl", "metrics.jsonl", "readings.jsonl", "model/model.safetensors"):
        ours, theirs = (folder / name).read_bytes(), (whole / name).read_bytes()
        assert ours.replace(str(folder).encode(), b"") == theirs.replace(str(whole).encode(), b""), name


@pytest.mark.slow
def test_a_curriculum_freshens_the_next_round_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "curriculum": {"name": "by_readings", "cooled_above": 0.0, "drift_below": -100.0, "fresh_notch": 0.5},
        "negatives": {"on_policy_fraction": 0.0, "rounds": 2},
        "stage2": {"steps": 6, "learning_rate": 1e-4},
        "probes": {"every": 3},
    }
    whole = train(tmp_path / "whole", **changes)
    rounds = read_jsonl(whole / "rounds.jsonl")
    assert [r["asked"] for r in rounds] == [0.0, 0.5]
    assert rounds[1]["realised"] == pytest.approx(0.5, abs=0.05)
    moves = [(r["step"], r["fresh"]) for r in read_jsonl(whole / "curriculum.jsonl")]
    assert moves[:2] == [(0, 0.0), (3, 0.5)]
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(folder, killer("step", (2, 5)), **changes)
    train(folder, resume=True, **changes)
    for name in ("rounds.jsonl", "curriculum.jsonl", "model/model.safetensors"):
        ours, theirs = (folder / name).read_bytes(), (whole / name).read_bytes()
        assert ours.replace(str(folder).encode(), b"") == theirs.replace(str(whole).encode(), b""), name


def test_a_changed_recipe_samples_again(whole: Path, encoder: Encoder) -> None:
    """Rows of a pool that other settings drew are not taken."""
    from cwdpo.onpolicy.pool import Pool
    from cwdpo.rundir import RunDir

    def pool(**changes: Any) -> Pool:
        return Pool(RunDir(whole), recipe(**changes), encoder, None)

    assert len(pool()._stored) == len(read_jsonl(whole / "pool.jsonl"))
    assert pool()._mark != pool(seed=1)._mark
    assert pool()._mark == pool(probes={"every": 3})._mark


# --- pieces ---------------------------------------------------------------------------------------------


def settings(**changes: Any) -> NegativeSettings:
    return NegativeSettings(**{"on_policy_fraction": 0.5, **changes})


def example(i: int, n_rejected: int = 1) -> Example:
    rejected = tuple(Completion(f"wrong {i} {k}") for k in range(n_rejected))
    return Example(f"e{i:03}", (), (Message("user", ("q",)),), Completion(f"right {i}"), rejected)


def samples(i: int, n: int) -> Sorted:
    return Sorted(tuple(Completion(f"said {i} {k}", "on_policy", "on_policy") for k in range(n)))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("with_samples", [40, 100])
def test_the_share_holds_whatever_prompts_lack_samples(fraction: float, with_samples: int) -> None:
    examples = [example(i) for i in range(100)]
    sampled = {e.id: samples(i, 2 if i < with_samples else 0) for i, e in enumerate(examples)}
    made, counts = blend(examples, sampled, settings(on_policy_fraction=fraction), 0, 0)
    assert counts.realised == pytest.approx(fraction, abs=0.01)
    if fraction * 100 <= with_samples:
        assert len(made) == 100
    else:
        assert len(made) == 100 - counts.left_out == round(with_samples / fraction)
    assert all(len(e.rejected) == 1 for e in made)


def test_a_blend_depends_on_seed_round_and_ids_alone() -> None:
    examples = [example(i, 3) for i in range(60)]
    sampled = {e.id: samples(i, i % 4) for i, e in enumerate(examples)}
    options = settings(per_prompt=2, rounds=2)

    def made(order: list[Example], seed: int = 0, round_: int = 0) -> dict[str, tuple[str, ...]]:
        rows, _ = blend(order, sampled, options, seed, round_)
        return {e.id: tuple(c.text for c in e.rejected) for e in rows}

    assert made(examples) == made(examples[::-1])
    assert made(examples) != made(examples, seed=1)
    assert made(examples) != made(examples, round_=1)
    for id_, texts in made(examples).items():
        assert len(set(texts)) == len(texts), id_


def test_what_samples_are_good_for() -> None:
    one = Example(
        "a", (), (Message("user", ("q",)),), Completion("A red ball."), references=("a blue  ball.",)
    )
    texts = [
        "",
        "a RED ball.",
        "A blue ball.",
        "red red red red red",
        "a cat",
        "A cat",
        "a dog",
        "a cow and",
        "far",
        "near",
    ]
    logps = [-1.0] * 8 + [-9.0, -0.01]
    drawn = PromptSamples(
        "a", 1, 30,
        tuple(
            Sample(t, ended=t != "a cow and", mean_logp=x, right=t == "a dog")
            for t, x in zip(texts, logps, strict=True)
        ),
        {"temperature": 0.7},
    )  # fmt: skip
    found = sort_samples(one, drawn, settings(easy_cut=-3.0, hard_cut=-0.1))
    assert [c.text for c in found.negatives] == ["a cat"]
    assert [c.text for c in found.right] == ["a dog"]
    assert found.dropped == {
        "empty": 1, "equal": 2, "degenerate": 1, "double": 1, "right": 1, "cut": 1, "easy": 1, "hard": 1,
    }  # fmt: skip
    made = found.negatives[0].made
    assert made == {"temperature": 0.7, "step": 30, "round": 1, "sample": 4, "mean_logp": -1.0}
    assert PromptSamples.from_json(json.loads(json.dumps(drawn.to_json()))) == drawn


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("a a a a", True), ("a a a b", False),
        ("the dog runs and the dog runs and the dog runs and the dog runs and", True),
        ("a dog and a cat and a bird and a cow", False), ("x y x y x y x y", True), ("x y x y x y", False), ("", False),
    ],
)  # fmt: skip
def test_degenerate(text: str, bad: bool) -> None:
    assert degenerate(text) == bad


def test_a_plan_goes_through_all_examples_before_any_twice() -> None:
    plan = RoundPlan(steps=30, per_round=10, batch=4)
    ids = [f"e{i}" for i in range(50)]
    stretches = [plan.prompts(ids, r, seed=3) for r in range(3)]
    assert [len(s) for s in stretches] == [40, 40, 40]
    stream = [i for s in stretches for i in s]
    assert sorted(stream[:50]) == sorted(ids) == sorted(stream[50:100])
    assert plan.prompts(ids[::-1], 1, seed=3) == stretches[1]


def test_rounds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="3 rounds of 2 steps do not fit into 4 steps"):
        RoundPlan.of(4, rounds=3, batch=4)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"rounds": 2}, "rounds needs on_policy_fraction"),
        ({"on_policy_fraction": 1.5}, "a number from 0 to 1"),
        ({"on_policy_fraction": [0.1, 0.2], "rounds": 3}, "2 shares for rounds = 3"),
        ({"on_policy_fraction": 1, "easy_cut": -1, "hard_cut": -2}, "easy_cut must be below hard_cut"),
        ({"on_policy_fraction": 1, "judge": {"name": "vlm"}}, "judge vlm: server: Field required"),
        (
            {
                "on_policy_fraction": 1,
                "rounds": 2,
                "sampler": {"server": {"base_url": "http://x/v1", "model": "m"}},
            },
            "set sampler.serve_adapter",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(section: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        parse_recipe({"data": {"path": "x.jsonl"}, "negatives": section})


def test_weights_are_exchanged_and_come_back_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    start = Weights.of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model[0].weight.add_(torch.randn(3, 3))
    moved = model[0].weight.detach().clone()
    with start.in_force(model):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model[0].weight, moved)
    with pytest.raises(ValueError, match="boom"), start.in_force(model):
        raise ValueError("boom")
    assert torch.equal(model[0].weight, moved)


def test_round_data_fills_up_from_the_first() -> None:
    data = RoundData(5)
    rows = [EncodedExample(str(i), EncodedPrompt((1,)), EncodedCompletion((1,))) for i in range(2)]
    data.fill(rows)
    assert [data[i].id for i in range(5)] == [e.id for e in data] == ["0", "1", "0", "1", "0"]
    assert len(data) == 5


def test_a_round_without_any_negative_says_why(tmp_path: Path) -> None:
    negatives = {"on_policy_fraction": 1.0, "rounds": 1, "sampler": {"max_new_tokens": 2}}
    data = {"world": {**TREE["data"]["world"], "questions": 0.0}}
    with pytest.raises(DataError, match=r"none of \d+ prompts has a negative.*'cut'"):
        train(tmp_path / "run", negatives=negatives, data=data)


# --- two processes --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_sample_and_blend_as_one(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    calm = {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 1e-5, "steps": 6}
    common = {
        "stage2": calm,
        "negatives": {"rounds": 2},
        "stage1": {"enabled": False},
        "probes": {"every": 50},
    }
    one = train(tmp_path / "one", train={"save_steps": None}, **common)
    two = recipe(train={"save_steps": None, "batch_size": 2}, **common)
    file.write_text(two.to_yaml())
    launch(tmp_path / "two", file, 2, mode)

    def said(folder: Path) -> dict[tuple[int, str], list[str]]:
        return {
            (r["round"], r["id"]): [s["text"] for s in r["samples"]]
            for r in read_jsonl(folder / "pool.jsonl")
        }

    assert said(tmp_path / "two") == said(one)
    for ours, theirs in zip(
        read_jsonl(tmp_path / "two" / "rounds.jsonl"), read_jsonl(one / "rounds.jsonl"), strict=True
    ):
        assert [p["rejected"] for p in ours["pairs"]] == [p["rejected"] for p in theirs["pairs"]]
        for origin, counts in theirs["by_origin"].items():
            assert ours["by_origin"][origin] == pytest.approx(counts, abs=1e-4)


@pytest.mark.slow
def test_with_lora_the_adapter_of_the_start_is_the_reference_and_a_kill_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "model": {"tune": "lora", "lora": {"r": 4, "alpha": 8}, "freeze": []},
        "stage2": {"objective": {"name": "cw_dpo", "beta": 0.3}, "learning_rate": 3e-3, "steps": 12},
        "negatives": {"rounds": 2, "recalibrate": True},
    }
    digests: list[str] = []
    original = reference.reference_digest
    monkeypatch.setattr(
        reference,
        "reference_digest",
        lambda model, bf16: digests.append(original(model, bf16=bf16)) or digests[-1],
    )
    expected = train(tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        train(tmp_path / "killed", killer("step", (2, 5)), **changes)
    train(tmp_path / "killed", resume=True, **changes)
    for name in ("pool.jsonl", "metrics.jsonl", "calibration-round1.json", "model/adapter_model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (expected / name).read_bytes(), name
    first = json.loads((expected / "calibration.json").read_text())
    again = json.loads((expected / "calibration-round1.json").read_text())
    assert again["floor"] != pytest.approx(first["floor"], abs=1e-3)
    rows = [r for r in read_jsonl(expected / "metrics.jsonl") if r["stage"] == "stage2"]
    assert [r["cooling/floor"] for r in rows] == pytest.approx([first["floor"]] * 6 + [again["floor"]] * 6)
    assert len(digests) > 2, "every start and every round asks for the reference"
    assert len(set(digests)) == 1, "the start's adapter is the reference of every round"
