"""Rules over readings, the way back to the last healthy weights, and what a resumed run knows of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cwdpo.config import parse_recipe
from cwdpo.dynamics.rules import ALIASES, first_violation, parse_rule
from cwdpo.errors import ModelError, RecipeError
from cwdpo.pipeline.two_stage import train_two_stage
from cwdpo.probes.base import PROBES
from cwdpo.records import Reading
from cwdpo.rundir import RunDir
from cwdpo.stage.listener import Listener
from cwdpo.trainer.weights import Weights

# --- rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reading", "comparison", "threshold"),
    [
        ("chosen_delta < -0.02", "delta_logp/chosen", "<", -0.02),
        ("kl>4e-2", "kl", ">", 0.04),
        (" cooling/weight/hard <= .1 ", "cooling/weight/hard", "<=", 0.1),
        ("gradient/vulnerable >= 0.5", "gradient/vulnerable", ">=", 0.5),
    ],
)
def test_a_rule_is_read(text: str, reading: str, comparison: str, threshold: float) -> None:
    rule = parse_rule(text)
    assert (rule.reading, rule.comparison, rule.threshold) == (reading, comparison, threshold)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os').system('x') < 1", "is not a rule"),
        ("kl", "is not a rule"),
        ("kl == 1", "is not a rule"),
        ("kl < 1 < 2", "is not a rule"),
        ("kll < 1", "did you mean 'kl'"),
        ("delta_logp/ < 1", "no reading"),
        ("kl < nan", "not a finite number"),
        ("kl < inf", "not a finite number"),
        ("kl < x", "not a finite number"),
        ("kl < 1 of nll", "is not a rule"),
        ("kl < of entropy", "is not a rule"),
    ],
)
def test_what_is_no_rule_is_refused_in_the_recipe(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"data": {"path": "x.jsonl"}, "stop": [text]})


def test_the_first_rule_that_holds_speaks_and_a_missing_value_never_does() -> None:
    rules = [parse_rule("chosen_delta < -0.02"), parse_rule("kl > 0.04")]
    readings = {
        "delta_logp/chosen": Reading("delta_logp/chosen", None, 0),
        "kl": Reading("kl", 0.05, 9, step=30),
    }
    found = first_violation(rules, readings)
    assert found is not None
    assert found.words() == "kl > 0.04: kl was 0.05 (n = 9) at step 30"
    share = [parse_rule("kl > 0.133 of entropy")]
    assert first_violation(share, readings, entropy=0.5) is None
    found = first_violation(share, readings, entropy=0.3)
    assert found is not None
    assert found.words() == "kl > 0.133 of entropy (0.0399): kl was 0.05 (n = 9) at step 30"
    assert first_violation(share, readings) == first_violation(share, readings, entropy=0.1) == found
    assert first_violation(rules, {"kl": Reading("kl", 0.04, 9)}) is None
    assert first_violation(rules, {}) is None


def test_rules_may_name_everything_that_probes_write(model, encoder, examples) -> None:
    from dataclasses import replace

    from cwdpo.monitor.influence import OneStep
    from cwdpo.monitor.probe_pass import ProbeSet
    from cwdpo.objectives.base import Scale

    named = [replace(e, source=f"set-{i % 2}") for i, e in enumerate(examples[:3])]
    encoded = encoder.encode_all(named, "rejected", require_negative=False)[0]
    held = ProbeSet(encoded, model).at_start(Scale(floor=-1.0, tau=0.5, beta=0.3))
    one = torch.ones(1, 1)
    held = replace(
        held.plus(held, "chosen_initial"),
        sampled={"on_policy": [("a", True)]},
        one_step=OneStep(("chosen",), one, one, one[0], one[0], one[0]),
    )
    written = [r.name for name in PROBES.names() for r in PROBES.build(name)(held)]
    assert len(written) > 30
    for name in written:
        assert parse_rule(f"{name} < 0").reading == name
    declared = [one for name in PROBES.names() for one in PROBES.get(name).readings]
    for one in declared:
        assert any(name == one or (one.endswith("/") and name.startswith(one)) for name in written), one
    assert all(parse_rule(f"{name} < 0") for name in ALIASES)


# --- a stage that ends early ----------------------------------------------------------------------------


def recipe(stop: list[str], **train: Any) -> Any:
    return parse_recipe(
        {
            "seed": 3,
            "model": {"path": "embedded", "device": "cpu", "freeze": ["vision"]},
            "data": {"world": {"seed": 1, "train": 48, "validation": 12, "test": 0}},
            "stage1": {"enabled": False, "objective": "sft", "learning_rate": 1e-4},
            "stage2": {"objective": {"name": "dpo", "beta": 0.3}, "learning_rate": 1e-3, "steps": 8},
            "train": {"batch_size": 4, "warmup_steps": 0, "logging_steps": 1, **train},
            "probes": {"every": 2, "prompts": 6, "types": ["shuffled"]},
            "evaluation": {"prompts": 0},
            "stop": stop,
        }
    )


def series(run: RunDir, name: str) -> dict[int, float]:
    return {r["step"]: r["value"] for r in run.readings() if r["stage"] == "stage2" and r["name"] == name}


@pytest.fixture(scope="module")
def to_the_end(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """KL by step of the run that nothing stops: it rises, so a threshold decides where it would stop."""
    run = train_two_stage(recipe([]), tmp_path_factory.mktemp("end") / "run")
    assert not (run.path / "stopped-stage2.json").exists()
    kl = series(run, "kl")
    assert sorted(kl) == [0, 2, 4, 6, 8]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] < kl[4]
    return kl


def test_a_violation_ends_the_stage_with_the_weights_of_the_measurement_before(to_the_end, tmp_path) -> None:
    rule = f"kl > {(to_the_end[2] + to_the_end[4]) / 2:.8f}"
    kept: dict[int, dict[str, torch.Tensor]] = {}
    heard: list[str] = []

    def keep(stage: str, step: int, model: Any) -> None:
        kept[step] = Weights.of(model).values

    run = train_two_stage(
        recipe([rule]), tmp_path / "run", listener=Listener(measured=keep, note=heard.append)
    )
    stopped = run.json("stopped-stage2.json")
    assert (stopped["step"], stopped["rolled_back_to"], stopped["rule"]) == (4, 2, rule)
    assert sorted(kept) == [0, 2, 4]
    from cwdpo.models.load import load_policy

    left = load_policy(recipe([]).model.model_copy(update={"path": str(run.path / "model")})).model
    now = dict(left.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in kept[2].items())
    assert any(not torch.equal(value, now[name]) for name, value in kept[4].items())
    # said in the log, the report and the model card; the summary is of the model that is left
    assert [text for text in heard if "ends early: kl >" in text] == [stopped["reason"]]
    assert "ends early: kl &gt;" in (run.path / "report.html").read_text()
    assert "ends early: kl >" in (run.path / "model" / "README.md").read_text()
    assert run.json("summary.json")["stages"]["stage2"]["step"] == 2
    assert run.json("summary.json")["stages"]["stage2"]["readings"]["kl"]["value"] == to_the_end[2]


@pytest.mark.slow
def test_a_resumed_stage_goes_back_as_far_as_an_uninterrupted_one(to_the_end, tmp_path, monkeypatch) -> None:
    """Killed after a checkpoint that lies behind the last healthy measurement."""
    rule = f"kl > {(to_the_end[2] + to_the_end[4]) / 2:.8f}"
    whole = train_two_stage(recipe([rule], save_steps=3), tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(stage: str, step: int, steps: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train_two_stage(recipe([rule], save_steps=3), tmp_path / "cut", listener=Listener(step=kill))
    checkpoint = tmp_path / "cut" / "stage2" / "checkpoint-3"
    assert (checkpoint / "healthy-0.safetensors").is_file()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Stopping"]["attributes"] == {"healthy_step": 2}
    cut = train_two_stage(recipe([rule], save_steps=3), tmp_path / "cut", resume=True)
    assert cut.json("stopped-stage2.json") == whole.json("stopped-stage2.json")
    assert not (tmp_path / "cut" / "stage2" / "checkpoint-4").exists()
    mine, theirs = (load_file(r.path / "model" / "model.safetensors") for r in (cut, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_rules_may_be_added_to_a_run_that_had_none(to_the_end, tmp_path) -> None:
    class Killed(BaseException):
        pass

    def kill(stage: str, step: int, steps: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train_two_stage(recipe([], save_steps=3), tmp_path / "run", listener=Listener(step=kill))
    assert to_the_end[6] > 1.01 * to_the_end[4]
    late = recipe([f"kl > {1.01 * to_the_end[4]:.8f}"], save_steps=1)
    run = train_two_stage(late, tmp_path / "run", resume=True, accept_changes=True)
    stopped = run.json("stopped-stage2.json")
    assert (stopped["step"], stopped["rolled_back_to"]) == (6, 4)


def test_readings_reach_the_terminal(to_the_end, tmp_path) -> None:
    from cwdpo.cli.watch import in_short

    lines: list[str] = []
    listener = Listener(readings=lambda stage, readings: lines.append(f"{stage} {in_short(readings)}"))
    run = train_two_stage(recipe([]), tmp_path / "run", listener=listener)
    assert [row["step"] for row in run.metrics()] == list(range(1, 9))
    assert not any(name.startswith("probe/") for row in run.metrics() for name in row)
    assert lines[0].startswith("stage2 Δchosen +0.000  margin +0.000  KL ")
    assert len(lines) == 5


def test_the_first_measurement_can_be_what_is_gone_back_to(to_the_end, tmp_path) -> None:
    run = train_two_stage(recipe([f"kl > {to_the_end[2] / 2:.8f}"]), tmp_path / "run")
    assert run.json("stopped-stage2.json")["rolled_back_to"] == 0


def test_weights_of_another_model_are_refused(model, tmp_path: Path) -> None:
    Weights({"x": torch.zeros(1)}).save(tmp_path / "healthy-0.safetensors")
    with pytest.raises(ModelError, match="other parameters than those trained"):
        Weights.load(tmp_path / "healthy-0.safetensors", model)
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot be read"):
        Weights.load(tmp_path / "cut.safetensors", model)


def test_a_probe_of_ones_own_is_read_and_may_stop_a_stage(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from cwdpo.probes.base import Probe\n"
        "class Mine(Probe):\n"
        "    readings = ('mine/gap',)\n"
        "    scale: float = 1.0\n"
        "    def __call__(self, held):\n"
        "        gap = self.scale * held.mean_logp[held.of('chosen')].abs()\n"
        "        return [held.reading('mine/gap', gap, 'nats/token')]\n"
    )
    spec = {"name": f"{tmp_path / 'mine.py'}:Mine", "scale": 2.0}
    probes = {"every": 2, "prompts": 6, "types": ["shuffled"], "extra": [spec]}
    tree = recipe([]).model_dump(mode="json") | {"probes": probes}
    with pytest.raises(RecipeError, match=r"no reading 'mine/gap'"):
        parse_recipe({**tree, "probes": {**probes, "extra": []}, "stop": ["mine/gap > 0"]})
    run = train_two_stage(parse_recipe({**tree, "stop": ["mine/gap > 0"]}), tmp_path / "run")
    mine = [r for r in run.readings() if r["name"] == "mine/gap"]
    nll = [r for r in run.readings() if r["name"] == "nll"]
    assert [r["step"] for r in mine] == [r["step"] for r in nll]
    assert mine[0]["n"] == 6
    assert run.json("stopped-stage2.json")["reading"] == "mine/gap"
