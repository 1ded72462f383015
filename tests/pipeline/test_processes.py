"""Several processes take the steps of one: DDP, FSDP2 and ZeRO on gloo, and nobody waits for ever.

There are two processes, or as many as ``CWDPO_PROCESSES`` says (2 or 4); the largest differences are printed.
ZeRO is tested where DeepSpeed is installed (``make test-deepspeed``).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chaos.commands import RECIPE, contents, difference
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.errors import ModelError
from cwdpo.files.reading import read_jsonl
from cwdpo.models.load import load_policy
from cwdpo.models.saved import load_weights
from cwdpo.objectives.base import OBJECTIVES, StepTotals
from cwdpo.pipeline.export import export
from cwdpo.rundir import RunDir
from cwdpo.scoring import plain
from cwdpo.scoring.pairs import reference_pass, scored_pairs
from cwdpo.trainer.processes import Unsharded
from launch import together
from paths import ROOT, TESTS

WORKER = TESTS / "process_worker.py"
CONFIGS = ROOT / "configs" / "accelerate"
WRAPPED = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPLlavaForConditionalGeneration",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
ZERO = ["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
MODES = ["ddp", "fsdp2", *ZERO]


def worker():
    spec = importlib.util.spec_from_file_location("process_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["process_worker"] = module
    spec.loader.exec_module(module)
    return module


SCENARIOS, PROCESSES = worker().SCENARIOS, worker().PROCESSES
BATCH = f"train.batch_size={16 // PROCESSES}"
"""Rows of a step on each process, where one process takes 16."""
EQUAL = sorted(set(SCENARIOS) - {"nan", "unreadable", "unreadable_by_workers"})


def launch(*arguments: str, codes: Sequence[int] | None = None) -> list[str]:
    """Start the worker's processes; their outputs."""
    return together([sys.executable, str(WORKER), *arguments], world=PROCESSES, codes=codes)


@pytest.fixture(scope="module")
def alone(world_folder, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run = worker().trained
    return {name: run(name, world_folder, model_folder, folder) for name in SCENARIOS}


@pytest.fixture(scope="module")
def with_zero_gradients(world_folder, model_folder, tmp_path_factory):
    """One process, in which the vision tower has a gradient of zeros in steps without an image."""
    return worker().trained("mixed", world_folder, model_folder, tmp_path_factory.mktemp("zeros"), zeros=True)


@pytest.fixture(scope="module", params=MODES)
def in_two(request, world_folder, model_folder, tmp_path_factory):
    """Mode, folder, and per rank what every scenario gave: all of them in one set of processes."""
    folder = tmp_path_factory.mktemp(request.param)
    # DeepSpeed cannot skip an update: tests/trainer/test_guard.py.
    names = [name for name in SCENARIOS if not (name == "spike" and request.param in ZERO)]
    launch(request.param, str(world_folder), str(model_folder), str(folder), *names)
    return (
        request.param,
        folder,
        [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)],
    )


def farthest(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def losses(result) -> list[float]:
    return [row["loss"] for row in result["logs"] if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_take_the_steps_of_one(in_two, alone, name, request) -> None:
    mode, _, (first, *others) = in_two
    if name not in first:
        pytest.skip("DeepSpeed cannot skip an update")
    one, two = alone[name], first[name]
    if name == "mixed" and mode in ZERO:
        one = request.getfixturevalue("with_zero_gradients")
    assert (one["error"], two["error"]) == ("", "")
    assert two["wrapped"] == WRAPPED[mode]
    expected, found = losses(one), losses(two)
    assert len(found) == SCENARIOS[name].arguments.get("max_steps", 6)
    assert max(expected) - min(expected) > 1e-4, "nothing was learned, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-5, rel=0)
    print(f"{mode}, {name}: loss {farthest(found, expected):.1e}")
    assert all(other[name]["skipped"] == one["skipped"] for other in (first, *others))
    assert bool(one["skipped"]) == (name == "spike")
    # Metrics are averaged over the same rows, each counted once. Only the padding is that of smaller batches.
    for a, b in zip(one["logs"], two["logs"], strict=True):
        measured = {k: v for k, v in a.items() if not k.startswith(("train_", "tokens/"))}
        if a.get("step") == 1:  # no shift yet: which of two zeros is larger is rounding
            measured.pop("rewards/accuracies", None)
        assert {k: b[k] for k in measured} == pytest.approx(measured, abs=1e-4, rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=1e-3)
    assert all(other[name]["weights"] == two["weights"] for other in others)


@pytest.mark.slow
def test_held_out_rows_are_scored_by_shares(in_two, alone) -> None:
    """Seven rows on several processes: each pair once, in the order of the rows; a sharded model is refused."""
    mode, _, results = in_two
    one, found = alone["uneven"]["held_out"], [result["uneven"]["held_out"] for result in results]
    assert all(other == found[0] for other in found)
    if mode != "ddp":
        assert "a sharded model" in found[0]["error"]
        return
    two = found[0]
    assert (one["n"], two["n"], len(two["rewards"])) == (7, 7, len(one["rewards"]))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert torch.tensor(two["rewards"]).flatten().tolist() == pytest.approx(
        torch.tensor(one["rewards"]).flatten().tolist(), abs=1e-4
    )
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4, rel=1e-4)


@pytest.mark.slow
def test_a_nan_on_one_process_stops_both_and_names_the_row(in_two, alone, model_folder) -> None:
    _, folder, results = in_two
    texts = [result["nan"]["error"] for result in results]
    assert len({*texts}) == 1
    assert texts[0].startswith("NonFiniteError: step 3: the loss is nan on examples train-00011;")
    report = json.loads((folder / "nan" / "nonfinite.json").read_text())
    (batch,) = report["micro_batches"]
    assert [e["id"] for e in batch["examples"] if not e["finite"]] == ["train-00011"]
    assert len(batch["examples"]) == 8 // PROCESSES, "the batch of the process that saw it"
    assert sorted(p.name for p in (folder / "nan").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    load_weights(worker().random_model(model_folder), folder / "nan" / "checkpoint-2")
    assert losses(results[0]["nan"]) == pytest.approx(losses(alone["nan"]), abs=1e-5)


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_stops_both(in_two) -> None:
    _, _, results = in_two
    for result in results:
        assert result["unreadable"]["error"] == "DataError: row 12: images: cannot be decoded (gone)"


@pytest.mark.slow
def test_an_image_that_a_worker_of_one_process_cannot_read_stops_both(in_two) -> None:
    _, _, (first, *others) = in_two
    text = first["unreadable_by_workers"]["error"]
    assert all(other["unreadable_by_workers"]["error"] == text for other in others)
    assert text.startswith("DataError: ")
    assert "train.jsonl:12: images: cannot be decoded (" in text


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_model_loaded_in_parts_is_the_whole_one(tmp_path, world_folder, tune) -> None:
    launch("fsdp2", str(world_folder), "-", str(tmp_path), "parts", tune)
    for file in (tmp_path / f"{tune}-whole").iterdir():
        assert (tmp_path / tune / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2", *ZERO])
def test_a_sharded_run_resumes_and_ends_as_undisturbed(tmp_path, mode) -> None:
    recipe, done = tmp_path / "recipe.yaml", tmp_path / "done"
    recipe.write_text(RECIPE)
    launch(mode, "-", "-", str(done), "recipe", str(recipe))
    parts = "optimizer_0/*.distcp" if mode == "fsdp2" else "global_step4/zero_pp_rank_1_*optim_states.pt"
    assert list((done / "stage2" / "checkpoint-4").glob(parts))
    wanted = contents(done)
    for lost in ("model", "stage2/checkpoint-6"):
        shutil.rmtree(done / lost)
    launch(mode, "-", "-", str(done), "resume", str(recipe))
    # torch stores the time in the description of a sharded checkpoint; of DeepSpeed's, equal values are pickled in
    # another order, and the copy of the weights, which nothing reads, names the tied head in two ways.
    not_bits = r"/\.metadata$" + (
        r"|/checkpoint-6/(model\.safetensors|global_step6/.*\.pt)$" if mode in ZERO else ""
    )
    assert not {n for n in difference(contents(done), wanted).split(", ") if n and not re.search(not_bits, n)}
    shutil.rmtree(done / "model")  # the last checkpoint is of the last step: it is loaded, not trained
    launch(mode, "-", "-", str(done), "resume", str(recipe))
    assert (done / "model" / "model.safetensors").read_bytes() == wanted["model/model.safetensors"]
    exported_alike(done, "stage2/checkpoint-6", tmp_path / "exported")


def exported_alike(run: Path, last: str, out: Path) -> None:
    """The last checkpoint, exported by one process, has the weights of the final model."""
    done = export(run / last, out, merge=False)
    assert done.checkpoints == (last,)
    (name,) = (path.name for path in out.glob("*.safetensors"))
    found, wanted = (load_file(folder / name) for folder in (out, run / "model"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "tune"),
    # ZeRO-2 keeps whole weights, so an adapter differs in nothing there.
    [(mode, tune) for mode in MODES for tune in ("full", "lora") if (mode, tune) != ("zero2", "lora")],
)
def test_a_whole_two_stage_run_of_two_processes_equals_one(tmp_path, mode, tune) -> None:
    small = [
        "stage1.steps=4", "stage2.steps=4", "data.world.train=40", "data.world.validation=8", "train.logging_steps=1",
        "calibration.samples=10", "evaluation.prompts=2", "train.save_steps=2", "probes.every=2", f"model.tune={tune}",
    ]  # fmt: skip
    if tune == "lora":
        small += [
            "negatives.on_policy_fraction=0.5",
            "negatives.rounds=2",
        ]
        if mode not in ZERO:  # refused there
            small += ["probes.types=[chosen_initial,on_policy]"]
    if tune == "lora" and mode != "ddp":
        small += ["probes.prompts=5"]  # also where rows cannot be divided evenly
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    launch(mode, "-", "-", str(tmp_path / "two"), "recipe", recipe, *small, BATCH)
    module = worker()
    one = module.train_two_stage(
        module.load_recipe(recipe, [*small, "train.batch_size=16"]), tmp_path / "one"
    )
    two = RunDir.open(tmp_path / "two")
    figures = {}
    for stage in ("stage1", "stage2"):
        a, b = ([r["loss"] for r in run.metrics() if r["stage"] == stage] for run in (one, two))
        assert len(a) == 4
        assert b == pytest.approx(a, abs=1e-5, rel=0)
        figures[f"loss of {stage}"] = farthest(a, b)
    readings = [
        {(r["stage"], r["step"], r["name"]): r["value"] for r in run.readings()} for run in (one, two)
    ]
    assert len(readings[0]) > 20
    missing = [{name for name, value in found.items() if value is None} for found in readings]
    assert missing[0] == missing[1]
    known = [{name: value for name, value in found.items() if value is not None} for found in readings]
    # A correlation of shifts that are near zero yet magnifies their rounding.
    fine = [{k: v for k, v in found.items() if k[2] != "length/correlation"} for found in known]
    assert fine[1] == pytest.approx(fine[0], abs=1e-4, rel=1e-4)
    assert known[1] == pytest.approx(known[0], abs=0.02)
    figures["readings"] = farthest([fine[1][k] for k in fine[0]], list(fine[0].values()))
    load_policy(_settings(tmp_path / "two" / "model"))
    for folder in ("stage1/model", "model"):
        (name,) = (p.name for p in (one.path / folder).glob("*.safetensors"))
        a, b = (load_file(run.path / folder / name) for run in (one, two))
        assert a.keys() == b.keys()
        figures[folder] = max(float((a[n] - b[n]).abs().max()) for n in a)
        assert figures[folder] < 1e-5
    drawn = [run.json("calibration.json")["mean_logps"] for run in (one, two)]
    assert drawn[1] == pytest.approx(drawn[0], abs=1e-5)
    figures["calibration"] = farthest(drawn[1], drawn[0])
    sampled = [
        {(r["round"], r["id"]): [s["text"] for s in r["samples"]] for r in run.rows("pool.jsonl")}
        for run in (one, two)
    ]
    assert sampled[1] == sampled[0]
    assert bool(sampled[0]) == (tune == "lora")
    print(f"{mode}, {tune}:", ", ".join(f"{name} {value:.1e}" for name, value in figures.items()))
    texts = [[[r["text"] for r in row["responses"]] for row in run.samples()] for run in (one, two)]
    assert texts[1] == texts[0]
    exported_alike(two.path, "stage2/checkpoint-4", tmp_path / "exported")


@pytest.mark.slow
def test_nobody_gives_up_on_a_first_process_that_works_alone(tmp_path) -> None:
    small = [
        "stage1.enabled=false", "stage2.steps=2", "data.world.train=24", "data.world.validation=8",
        "calibration.samples=10", "evaluation.prompts=4", "evaluation.batch_size=2", "train.save_steps=1",
        "probes.every=2",
    ]  # fmt: skip
    first, second, *_ = launch(
        "ddp", "-", "-", str(tmp_path / "run"), "slow", str(ROOT / "recipes" / "tiny.yaml"), *small
    )
    assert "the training's own group: " in second, (
        "with a timeout of two seconds, a wait of eight must fail there"
    )
    for what in ("reading data", "evaluation and report"):
        assert f"process 1 waits for another since 0 min ({what}" in second
    assert "waits for another" not in first
    assert len(RunDir.open(tmp_path / "run").samples()) == 4
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_process_that_dies_alone_ends_the_others(tmp_path) -> None:
    first, second, *_ = launch("ddp", "-", "-", str(tmp_path), "dies", codes=[9, *[0] * (PROCESSES - 1)])
    assert (
        "ProcessError: process 1: another process of the run ended while this one waited (a test)" in second
    )
    assert "continue with --resume" in second
    assert first == ""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_stop_and_steer_as_one_does(tmp_path, mode) -> None:
    """A curriculum that moves at every measurement, and a rule that holds at the third of four."""
    small = [
        "stage1.steps=2", "stage2.steps=8", "stage2.learning_rate=1e-3", "data.world.train=40",
        "data.world.validation=8", "data.world.negatives_per_prompt=3", "train.logging_steps=1",
        "calibration.samples=10", "evaluation.prompts=0", "probes.every=2",
        "curriculum={name: by_readings, start_high: 1.0, cooled_above: 0.0, notch: 0.2, narrowest: 0.2}",
    ]  # fmt: skip
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    module = worker()

    def alone(out: Path, stop: str) -> RunDir:
        return module.train_two_stage(module.load_recipe(recipe, [*small, stop, "train.batch_size=16"]), out)

    free = alone(tmp_path / "free", "stop=[]")
    assert len(read_jsonl(free.path / "curriculum.jsonl")) >= 3
    margins = {
        r["step"]: r["value"] for r in free.readings() if r["name"] == "margin" and r["stage"] == "stage2"
    }
    assert sorted(margins) == [0, 2, 4, 6, 8]
    assert max(margins[s] for s in (0, 2, 4)) < margins[6]
    stop = f"stop=[margin > {(margins[6] + max(margins[s] for s in (0, 2, 4))) / 2}]"
    one = alone(tmp_path / "one", stop)
    launch(mode, "-", "-", str(tmp_path / "two"), "recipe", recipe, *small, BATCH, stop)
    two = RunDir.open(tmp_path / "two")
    for run in (one, two):
        stopped = run.json("stopped-stage2.json")
        assert (stopped["step"], stopped["rolled_back_to"]) == (6, 4)
    assert [r["loss"] for r in two.metrics() if r["stage"] == "stage2"] == pytest.approx(
        [r["loss"] for r in one.metrics() if r["stage"] == "stage2"], abs=1e-4
    )
    moves = [
        [(r["step"], r["negatives"]) for r in read_jsonl(run.path / "curriculum.jsonl")] for run in (one, two)
    ]
    assert moves[0] == moves[1]
    states = [load_file(run.path / "model" / "model.safetensors") for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert max(float((states[0][n] - states[1][n]).abs().max()) for n in states[0]) < 1e-4


def _settings(folder: Path):
    from cwdpo.config import ModelSettings

    return ModelSettings(path=str(folder), device="cpu")


@pytest.fixture
def encoded(encoder, examples, model):
    return reference_pass(model, encoder.encode_all(examples[:6], "rejected", require_negative=True)[0])


def gradients(model, batch):
    model.zero_grad()
    output = OBJECTIVES.build({"name": "cw_dpo", "floor": -6.0, "tau": 0.5, "sft_weight": 0.3})(
        scored_pairs(batch, plain.score(model, batch))
    )
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_silent_row_runs_the_vision_tower_and_changes_nothing(model, encoded) -> None:
    image_token = model.config.image_token_id
    text_only = [
        type(e)(
            e.id,
            EncodedPrompt(tuple(t for t in e.prompt.input_ids if t != image_token)),
            e.chosen,
            e.negatives,
        )
        for e in encoded[:3]
    ]
    batch = collate(text_only)
    called = []
    model.model.vision_tower.register_forward_hook(lambda *_: called.append(1))
    loss, before = gradients(model, batch)
    assert not called
    assert not any("vision" in name for name in before)
    silent_loss, after = gradients(model, batch.with_silent_row(encoded[4].prompt))
    assert called
    assert float(silent_loss) == pytest.approx(float(loss), abs=1e-6)
    for name, gradient in before.items():
        assert torch.allclose(gradient, after.pop(name), atol=1e-6), name
    assert any("vision_tower" in name for name in after), "the backward pass goes through it as well"
    assert all(not gradient.any() for gradient in after.values())


@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_first_rows_of_a_batch_are_the_batch_of_the_first_rows(encoded, n) -> None:
    kept = collate(encoded).first_examples(n)
    expected = collate(encoded[:n])
    for name, value in vars(expected).items():
        found = getattr(kept, name)
        same = torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
        assert same, name


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "sft_constrained", "penalty": 0.5, "constraint": 7.0},
        {"name": "sft_smoothed", "weight": 0.2},
        {"name": "cw_dpo", "floor": -6.0, "tau": 0.5, "sft_weight": 0.3},
    ],
    ids=lambda spec: spec["name"],
)
def test_a_process_without_a_row_of_its_own_adds_nothing(model, encoded, spec) -> None:
    objective = OBJECTIVES.build(spec)
    batch = collate(encoded).first_examples(0).with_silent_row(encoded[0].prompt)
    pairs = scored_pairs(
        batch,
        plain.score(model, batch, stats=objective.token_stats),
        StepTotals(6.0, 100.0, 120.0, ahead=(720.0,)),
    )
    output = objective(pairs)
    assert float(output.loss.detach()) == 0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(value.numel() == 0 for value in output.per_pair.values())


def test_a_model_is_put_together_again_with_ties_and_frozen_parts(model) -> None:
    model.model.vision_tower.requires_grad_(False)
    places = Unsharded(model)
    whole = places.filled(model)
    assert whole is not model
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    for (name, a), (other, b) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (name, a.requires_grad) == (other, b.requires_grad)
        assert torch.equal(a, b)
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(0))
    model.get_input_embeddings().weight = model.lm_head.weight
    with pytest.raises(ModelError, match="embed_tokens"):
        places.filled(model)


def test_every_accelerate_config_is_whole() -> None:
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert set(found) == {"ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"}
    kinds = {name: config["distributed_type"] for name, config in found.items()}
    assert kinds == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED",
    }  # fmt: skip
    # What the tests set by hand for FSDP2 is what the shipped file says.
    environment = {key.upper(): str(value).lower() for key, value in found["fsdp2"]["fsdp_config"].items()}
    for key, value in worker().SHARDED.items():
        if key.startswith("FSDP_"):
            assert environment[key] == value.lower(), key
    assert found["deepspeed_zero2"]["deepspeed_config"]["zero_stage"] == 2
    assert found["deepspeed_zero3"]["deepspeed_config"]["zero_stage"] == 3


def test_weights_on_the_first_process_alone_are_refused(model_folder, monkeypatch) -> None:
    monkeypatch.setattr("transformers.integrations.is_fsdp_enabled", lambda: True)
    with pytest.raises(ModelError, match="fsdp_cpu_ram_efficient_loading"):
        load_policy(_settings(model_folder))
