"""`cwdpo plan`: memory against torch's own record of a real training step, operations against torch's counter and by
hand, and what the command says."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, TrainingArguments

import random_models
from cwdpo.arguments import TrainSettings
from cwdpo.config import Recipe, parse_recipe
from cwdpo.data.encode.collate import collate
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.data.read.reader import read_examples
from cwdpo.models.hollow import hollow_model
from cwdpo.models.load import EMBEDDED, Policy, adopt, load_policy
from cwdpo.models.settings import ModelSettings
from cwdpo.models.tiny import TinyModelSettings, init_model
from cwdpo.models.vision_cache import keep_vision_features
from cwdpo.pipeline.planning.costs import HollowRun, remedies
from cwdpo.pipeline.planning.gpus import GPUS, Gpu
from cwdpo.pipeline.planning.rows import StageRows
from cwdpo.pipeline.planning.run import Hardware, plan_run
from cwdpo.scoring.pairs import with_reference
from cwdpo.scoring.score import score
from cwdpo.trainer.dry_step import DryRun, HowToStep, Tally
from cwdpo.trainer.trainer import PreferenceTrainer
from cwdpo.worlds.shapes import VOCABULARY

Run = Callable[..., Any]  # the fixture `run`: arguments -> code, out, err
ROWS = 8
LORA = {"tune": "lora", "freeze": ["vision"]}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "full, 1 negative": ({}, {}, 1),
    "full, 4 negatives, checkpointing": ({}, {"gradient_checkpointing": True}, 4),
    "full, bf16, 1 negative": ({}, {"bf16": True}, 1),
    "LoRA, 1 negative": (LORA, {}, 1),
    "LoRA, 4 negatives, checkpointing": (LORA, {"gradient_checkpointing": True}, 4),
    "nf4, 1 negative": ({**LORA, "quantization": "nf4"}, {}, 1),
    "nf4, 4 negatives, checkpointing": (
        {**LORA, "quantization": "nf4"},
        {"gradient_checkpointing": True},
        4,
    ),
}
"""The sections ``model`` and ``train``, and negatives per prompt."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose activations for 300-token prompts outweigh its weights."""
    shape = TinyModelSettings(width=256, layers=4, heads=8, vocabulary=512)
    return init_model(tmp_path_factory.mktemp("planning") / "llava", [" ".join(VOCABULARY)] * 3, shape)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with an image, a long prompt and four negatives."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(sorted(VOCABULARY)) for _ in range(words))

    rows = []
    for i in range(ROWS):
        Image.new("RGB", (48, 48), (i, 100, 200)).save(folder / f"{i}.png")
        prompt = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text(260 + 5 * i)}]}
        ]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": text(15 + i)}],
                "rejected": [{"role": "assistant", "content": text(15)}],
                "images": [f"{i}.png"],
                "negatives": [{"text": text(15), "origin": "dataset", "kind": f"k{k}"} for k in range(4)],
            }
        )
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_of(checkpoint: Path, data: Path, model: dict[str, Any], **train: Any) -> Recipe:
    return parse_recipe(
        {
            "model": {"path": str(checkpoint), "device": "cpu", "dtype": "float32", **model},
            "data": {"path": str(data), "stage1_fraction": 0.5, "validation_fraction": 0.25},
            "stage2": {"objective": "dpo"},
            "train": {"batch_size": 4, **train},
        }
    )


@contextmanager
def allocated() -> Iterator[list[int]]:
    """Afterwards, the most bytes that torch's allocator held at a time, beyond those it held before."""
    found: list[int] = []
    gc.collect()  # what earlier tests left would be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield found
    events = record.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found.append(peak)


def measured(policy: Policy, rows: list[EncodedExample], train: TrainSettings, folder: Path) -> int:
    """Bytes of a model and of two steps of the trainer, of which the second has the optimizer's state."""
    known = [(-20.0, -20.0)] * 9
    examples = [with_reference(row, known[: len(row.completions)]) for row in rows]
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=len(rows), max_steps=2, learning_rate=1e-5,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        activation_checkpointing=train.gradient_checkpointing, bf16=train.bf16,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
    )  # fmt: skip
    objective = parse_recipe({"data": {"path": "x"}, "stage2": {"objective": "dpo"}}).stage2.build()
    trainer = PreferenceTrainer(policy.model, args, objective, examples)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in policy.model.parameters()}
    with allocated() as found:
        trainer.train()
    return sum(held.values()) + found[0]


def planned_and_measured(checkpoint: Path, data: Path, name: str, folder: Path) -> tuple[int, int]:
    model, train, negatives = SETTINGS[name]
    recipe = recipe_of(checkpoint, data, model, **train)
    policy = load_policy(recipe.model)
    examples = read_examples(data).examples
    encoded, problems = policy.encoder().encode_all(examples, "rejected", require_negative=True)
    assert not problems
    rows = [EncodedExample(e.id, e.prompt, e.chosen, e.negatives[:negatives]) for e in encoded]
    rows = sorted(rows, key=lambda row: sum(row.row_tokens(shared=True)))[-4:]
    assert {len(row.negatives) for row in rows} == {negatives}
    assert min(len(row.prompt.input_ids) for row in rows) >= 250
    planned = HollowRun(AutoConfig.from_pretrained(checkpoint), 1).peak(
        recipe, [StageRows("stage2", rows, len(rows))]
    )
    return planned.total, measured(policy, rows, recipe.train, folder)


SLOW = {
    "full, 4 negatives, checkpointing",
    "full, bf16, 1 negative",
    "LoRA, 1 negative",
    "nf4, 4 negatives, checkpointing",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SETTINGS]
)
def test_the_planned_peak_is_that_of_a_real_step(
    checkpoint: Path, data: Path, tmp_path: Path, name: str
) -> None:
    planned, found = planned_and_measured(checkpoint, data, name, tmp_path)
    print(f"\n| {name} | {planned / 2**20:.1f} | {found / 2**20:.1f} | {planned / found - 1:+.1%} |")
    assert planned == pytest.approx(found, rel=0.05)


# --- operations -----------------------------------------------------------------------------------------

ATTENTION = {  # torch's counter knows attention on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({}, False),
    "full, plain, checkpointing": ({"scoring": "plain"}, True),
    "LoRA": ({"tune": "lora", "freeze": ["vision", "projector"]}, False),
    "LoRA, checkpointing": ({"tune": "lora", "freeze": ["vision", "projector"]}, True),
}
EVERY_WAY = ("llava", "qwen2_5_vl")


def counted(name: str, settings: ModelSettings, checkpointing: bool) -> tuple[int, int, Any]:
    """Operations of a real step by torch's counter: of the vision side's cached features, and of the rest."""
    policy = adopt(Policy(random_models.build(name), None, name), settings)
    batch = collate(random_models.ragged(name, policy.model, 2))
    model: Any = policy.model.train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def operations() -> int:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            score(model, batch).logp.sum().backward()
        return int(counter.get_total_flops())

    keep_vision_features(model, settings.vision_cache_gb)
    first, second = operations(), operations()  # the second step finds features in the cache
    return first - second, second, batch


COUNTED = [
    pytest.param(name, way, marks=() if name in EVERY_WAY else pytest.mark.slow)
    for name in random_models.FAMILIES
    for way in (WAYS if name in EVERY_WAY else ("LoRA, checkpointing",))
]
"""Two families in all ways, the others in one."""


@pytest.mark.parametrize(("name", "way"), COUNTED)
def test_operations_are_those_of_torchs_counter(name: str, way: str) -> None:
    asked, checkpointing = WAYS[way]
    settings = ModelSettings.model_validate({"dtype": "float32", "device": "cpu", **asked})
    vision, rest, batch = counted(name, settings, checkpointing)
    model, _ = hollow_model(random_models.config(name), settings)
    keep_vision_features(model, settings.vision_cache_gb)
    cost = DryRun(model).step(batch, HowToStep(checkpointing=checkpointing))
    assert (cost.vision, cost.forward + cost.backward) == (vision, rest)
    assert (vision > 0) == (way.startswith("LoRA"))
    assert (cost.cached > 0) == (way.startswith("LoRA"))


def test_operations_of_the_forward_pass_by_hand() -> None:
    settings = ModelSettings(dtype="float32", device="cpu")
    real = random_models.build("llava")
    row = random_models.example("llava", real, (9, 5), images=0, before=20, after=12)
    model, _ = hollow_model(random_models.config("llava"), settings)
    cost = DryRun(model).step(collate([row]), HowToStep())
    text = random_models.TEXT
    prompt, told, layers = 32, 9 + 5, text["num_hidden_layers"]
    width, inner = text["hidden_size"], text["intermediate_size"]
    keys = width // text["num_attention_heads"] * text["num_key_value_heads"]
    linear = 2 * (prompt + told) * (2 * width**2 + 2 * width * keys + 3 * width * inner)
    attention = 2 * 2 * width * (prompt**2 + told * (prompt + told))
    head = 2 * told * width * text["vocab_size"]
    assert cost.forward == layers * (linear + attention) + head
    # Each product has two in the backward pass, and attention computes its scores once more; the embedding has none.
    assert cost.backward == 2 * (layers * linear + head) + layers * attention * 5 // 2


def test_memory_is_counted_until_it_is_freed() -> None:
    tally = Tally(vocabulary=7)
    with tally:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        del first
        logits = torch.zeros(3, 7)
    assert (tally.now, tally.peak) == (4000 + 84, 8000)
    assert tally.parts == {"inputs": 4000, "output head": 84}
    del second, view, logits
    assert tally.now == 0


# --- plans ----------------------------------------------------------------------------------------------


def stages(checkpoint: Path, data: Path, recipe: Recipe) -> list[StageRows]:
    examples = read_examples(data).examples
    encoded, _ = load_policy(recipe.model).encoder().encode_all(examples, "rejected", require_negative=True)
    return [StageRows("stage2", encoded, len(encoded))]


@pytest.mark.slow
def test_settings_are_tried_until_the_run_fits(checkpoint: Path, data: Path) -> None:
    recipe = recipe_of(checkpoint, data, {}, gradient_accumulation_steps=3)
    run, rows = HollowRun(AutoConfig.from_pretrained(checkpoint), 1), stages(checkpoint, data, recipe)
    whole = run.peak(recipe, rows).total
    first, _ = remedies(run, recipe, rows, whole - 1)
    assert [remedy.settings for remedy in first] == [("train.gradient_checkpointing=true",)]
    assert first[0].fits
    assert first[0].memory.total < 0.6 * whole
    all_, left = remedies(run, recipe, rows, 0)
    sizes = [remedy.memory.total for remedy in all_]
    assert sizes == sorted(sizes, reverse=True)
    assert not any(remedy.fits for remedy in all_)
    assert all_[-1].settings == (
        "train.gradient_checkpointing=true", "train.batch_size=1", "train.gradient_accumulation_steps=12",
        "model.tune=lora", "model.quantization=nf4",
    )  # fmt: skip
    assert (left.model.quantization, left.train.batch_size) == ("nf4", 1)
    second, _ = remedies(run, recipe, rows, all_[1].memory.total)
    assert second[-1].fits
    assert second[-1].memory.prompts == 1


@pytest.mark.slow
def test_smaller_micro_batches_in_tokens_have_room_for_every_row(checkpoint: Path, data: Path) -> None:
    recipe = recipe_of(checkpoint, data, {}, max_tokens_per_batch=4000)
    run, rows = HollowRun(AutoConfig.from_pretrained(checkpoint), 1), stages(checkpoint, data, recipe)
    longest = max(row.row_tokens(shared=True)[0] for row in rows[0].sample)
    tried, _ = remedies(run, recipe, rows, 0)
    settings = next(r.settings for r in tried if any("max_tokens" in text for text in r.settings))
    assert f"train.max_tokens_per_batch={longest}" in settings
    assert f"train.gradient_accumulation_steps={-(-4000 // longest)}" in settings


def test_the_plan_of_a_run_adds_up(checkpoint: Path, data: Path) -> None:
    recipe = recipe_of(checkpoint, data, {"tune": "lora", "freeze": ["vision"]}, batch_size=1)
    gpu = Gpu("custom", 1, 100)
    plan = plan_run(recipe, Hardware(gpu, gpus=2, utilisation=0.5, price=3.0))
    assert plan.fits
    assert not plan.remedies
    assert sum(plan.memory.parts.values()) == plan.memory.total
    assert plan.memory.parts["gradient buckets"] * 2 == plan.memory.parts["optimizer state"]
    assert [(s.name, s.rows, s.steps) for s in plan.stages] == [("stage1", 3, 2), ("stage2", 3, 2)]
    for stage in plan.stages:
        assert stage.prompts_per_step == 2
        assert stage.total == stage.step * stage.steps + stage.reference + stage.probes
    first, second = plan.stages
    assert (first.ahead, first.reference) == (first.forward, 0)
    assert second.ahead == 0
    assert second.reference == pytest.approx(second.forward / 2 * 3)  # three rows, and a step has two
    assert plan.hours == pytest.approx((first.total + second.total) / (2 * 0.5 * 100e12) / 3600)
    assert plan.cost == pytest.approx(3.0 * 2 * plan.hours)
    assert plan.communication == plan.memory.parts["gradient buckets"], (
        "an all-reduce of 2 sends 2 * 1/2 of them"
    )
    assert plan.seconds_to_send is None


def test_what_fsdp2_sends_is_what_two_processes_sent() -> None:
    """Counted in the collectives of two gloo processes that train the embedded model with checkpointing."""
    gathered, reduced = 11_600_384, 3_755_520
    settings = {"path": "embedded", "freeze": ["vision"]}
    config = AutoConfig.from_pretrained(EMBEDDED)
    for times in (1, 2):
        tree = {
            "model": settings, "data": {"path": "x.jsonl"}, "train": {"gradient_accumulation_steps": times},
        }  # fmt: skip
        sent = HollowRun(config, 2, sharded=True).communication(parse_recipe(tree))
        # FSDP2 pads parameters whose first dimension cannot be divided: here 512 bytes in either direction.
        assert sent == pytest.approx((times * gathered + reduced) / 2, abs=times * 1024)


# --- the command ----------------------------------------------------------------------------------------


def weightless(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint's configurations, tokenizer and processor."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
def test_the_command_needs_no_weights(
    run: Run, model_folder: Path, world_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    bare = weightless(model_folder, tmp_path / "bare")
    recipe.write_text(recipe_of(bare, world_folder / "train.jsonl", {}).to_yaml())
    said = run("plan", recipe, "--gpu", "4090", "--price", "0.5")
    assert said.code == 0, said.err
    assert "it fits" in said.out
    assert "costs" in said.out
    found = json.loads(run("plan", recipe, "--gpu", "4090", "--json").out)
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values())
    gpu = {"name": "4090", "memory_gib": 24.0, "tflops": 165.2, "link": 32, "bf16": True}
    assert found["hardware"]["gpu"] == gpu
    assert (found["communication"], found["seconds_to_send"]) == (0, 0)
    assert found["images"]["workers"] > 0
    several = run("plan", recipe, "--gpu", "h100", "--gpus", "2", "--fsdp", "--link", "0.1", "--rows", "8")
    assert "sends    at most" in several.out
    assert "at 0.1 GB/s, where nothing overlaps" in several.out
    old = run("plan", recipe, "--gpu", "t4", "train.bf16=true", "--rows", "8")
    assert "8.1 TFLOP/s in float32" in old.out
    assert "t4 has no bfloat16 units: in float32" in old.out


@pytest.mark.slow
def test_a_run_that_cannot_fit_ends_with_code_1(
    run: Run, model_folder: Path, world_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(model_folder, world_folder / "train.jsonl", {"tune": "lora"}).to_yaml())
    said = run("plan", recipe, "--gpu-memory", "0.001", "--tflops", "10", "--rows", "8")
    assert said.code == 1
    assert "it does not fit" in said.out
    assert "model.quantization=nf4" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h10"), ("'h10'", "did you mean", *GPUS)),
        ((), ("--gpu-memory", "--tflops", "h100")),
        (("--gpu", "h100", "model.path=./nowhere"), ("model.path", "no such folder", "embedded")),
    ],
)
def test_bad_input_is_one_line(
    run: Run, data: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(tmp_path, data, {}).to_yaml())
    said = run("plan", recipe, *arguments)
    assert said.code == 1
    assert len(said.err.splitlines()) == 1
    for word in words:
        assert word in said.err
