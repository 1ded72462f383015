"""Memory by part: against models that are loaded, and the table of docs/models.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLConfig

from cwdpo.models.load import EMBEDDED, load_policy
from cwdpo.models.memory import Memory, empty_model, planned_memory
from cwdpo.models.quantization import quantized_layers
from cwdpo.models.settings import ModelSettings
from paths import ROOT

LORA = {"tune": "lora", "lora": {"r": 16, "alpha": 32}, "freeze": ["vision"]}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"tune": "full"},
    "full, frozen tower": {"tune": "full", "freeze": ["vision"]},
    "LoRA": LORA,
    "LoRA, projector saved": {**LORA, "lora": {"r": 4, "modules_to_save": ["multi_modal_projector"]}},
    "int8": {**LORA, "quantization": "int8"},
    "nf4": {**LORA, "quantization": "nf4"},
    "nf4, single": {**LORA, "quantization": "nf4", "quantization_options": {"double_quantization": False}},
    "nf4, tower left out": {**LORA, "quantization": "nf4", "quantization_options": {"skip": ["vision"]}},
}


def measured(policy: Any) -> Memory:
    """Bytes of the tensors of a loaded model after one step of AdamW."""
    quantized: dict[int, int] = {}
    for _, layer in quantized_layers(policy.model):
        weight = layer.weight
        if hasattr(weight, "quant_state"):
            state = weight.quant_state
            tensors = [weight, state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
        else:
            tensors = [weight, layer.state.SCB]
        quantized[id(weight)] = sum(t.nbytes for t in tensors)
    named = dict(policy.model.named_parameters())
    trained = list(policy.trainable().values())
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    layers = [layer for _, layer in quantized_layers(policy.model)]
    largest = max((layer.in_features * layer.out_features for layer in layers), default=0)
    computed = policy.model.get_input_embeddings().weight.itemsize
    if computed < 4 and any(hasattr(layer, "state") for layer in layers):  # int8: float32, then the cast
        computed += 4
    return Memory(
        weights=sum(p.nbytes for n, p in named.items() if ".lora_" not in n and id(p) not in quantized),
        quantized=sum(quantized.values()),
        adapters=sum(p.nbytes for n, p in named.items() if ".lora_" in n),
        gradients=sum(p.grad.nbytes for p in trained),
        optimizer=sum(t.nbytes for t in states),
        dequantized=largest * computed,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_planned_is_what_a_loaded_model_takes(model_folder: Path, way: str, dtype: str) -> None:
    settings = ModelSettings.model_validate(
        {"path": str(model_folder), "device": "cpu", "dtype": dtype, **WAYS[way]}
    )
    planned = planned_memory(empty_model(AutoConfig.from_pretrained(model_folder), dtype), settings)
    assert planned == measured(load_policy(settings))
    assert planned.total == sum(vars(planned).values())


def test_the_kahan_optimizer_takes_ten_bytes_a_weight(model_folder: Path) -> None:
    settings = ModelSettings(path=str(model_folder), dtype="bfloat16")
    model = empty_model(AutoConfig.from_pretrained(model_folder), "bfloat16")
    numbers = sum(p.numel() for p in model.parameters())
    assert planned_memory(model, settings, "adamw_kahan").total == 10 * numbers


def qwen(size: str) -> Qwen2_5_VLConfig:
    """The shapes of Qwen2.5-VL."""
    text = {
        "3B": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
        "7B": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        },
    }[size]  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"]
    )


SHAPES = {
    "embedded": lambda: AutoConfig.from_pretrained(EMBEDDED),
    "Qwen2.5-VL 3B": lambda: qwen("3B"),
    "Qwen2.5-VL 7B": lambda: qwen("7B"),
}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full, float32": ("float32", "adamw", {"tune": "full"}),
    "full, bf16, `adamw_kahan`": ("bfloat16", "adamw_kahan", {"tune": "full"}),
    "LoRA, bf16": ("bfloat16", "adamw", LORA),
    "LoRA, int8": ("bfloat16", "adamw", {**LORA, "quantization": "int8"}),
    "LoRA, nf4": ("bfloat16", "adamw", {**LORA, "quantization": "nf4"}),
}


def table() -> list[str]:
    lines = [
        "| model | what is trained | base | quantized base | adapters | gradients | optimizer | one layer | together |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in SHAPES.items():
        unit, shown = (2**20, "MiB") if name == "embedded" else (2**30, "GiB")
        for way, (dtype, optimizer, asked) in ROWS.items():
            settings = ModelSettings.model_validate({"dtype": dtype, **asked})
            found = planned_memory(empty_model(config(), dtype), settings, optimizer)  # type: ignore[arg-type]
            cells = [f"{value / unit:.2f}" if value else "" for value in (*vars(found).values(), found.total)]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} {shown} |")
    return lines


def test_the_table_of_the_docs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    lacking = [line for line in table() if line not in page]
    assert not lacking, "docs/models.md lacks:\n" + "\n".join(lacking)


@pytest.mark.parametrize(("size", "billions"), [("3B", 3.755), ("7B", 8.292)])
def test_the_shapes_are_those_of_the_checkpoints(size: str, billions: float) -> None:
    numbers = sum(p.numel() for p in empty_model(qwen(size), "bfloat16").parameters())
    assert numbers / 1e9 == pytest.approx(billions, abs=0.001)
