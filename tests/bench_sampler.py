"""Seconds of `generate(num_return_sequences=K)` over those of one shared prefill, in turns in one process.

    python tests/bench_sampler.py [rounds]

A random Qwen2.5-VL (8 layers of width 384, 224 image tokens) on one thread in fp32; P prompt
tokens, C new ones, K samples.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.models.sample import Decoding, shared_prefill

P, C, K = 256, 32, 4
GRID = (14, 16)


def build() -> tuple[torch.nn.Module, EncodedPrompt]:
    torch.manual_seed(0)
    text = {
        "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0,
        "eos_token_id": None, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": 8, "hidden_size": 256, "intermediate_size": 688, "num_heads": 4, "out_hidden_size": 384,
        "fullatt_block_indexes": [3, 7],
    }  # fmt: skip
    ids = {
        "image_token_id": 31000,
        "video_token_id": 31001,
        "vision_start_token_id": 31002,
        "vision_end_token_id": 31003,
    }
    model = AutoModelForImageTextToText.from_config(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    n = GRID[0] * GRID[1]
    prompt = (
        *torch.randint(5, 30000, (10,)).tolist(),
        *[31000] * n,
        *torch.randint(5, 30000, (P - n - 10,)).tolist(),
    )
    images = {
        "pixel_values": torch.randn(4 * n, 1176),
        "image_grid_thw": torch.tensor([[1, 2 * GRID[0], 2 * GRID[1]]]),
    }
    types = tuple(int(i == 31000) for i in prompt)
    return model.eval(), EncodedPrompt(prompt, {"mm_token_type_ids": types}, lambda: images)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    model, prompt = build()
    ids = torch.tensor([prompt.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.images}
    inputs["mm_token_type_ids"] = torch.tensor([prompt.per_token["mm_token_type_ids"]])
    decoding = Decoding(1.0, 1.0, C)

    def theirs() -> None:
        model.generate(**inputs, max_new_tokens=C, do_sample=True, top_k=0, num_return_sequences=K)

    def ours() -> None:
        shared_prefill(model, [prompt], K, decoding, [str(k) for k in range(K)], end_ids=frozenset(), pad=0)

    theirs(), ours()
    ratios = []
    for _ in range(rounds):
        began = time.perf_counter()
        theirs()
        between = time.perf_counter()
        ours()
        ratios.append((between - began) / (time.perf_counter() - between))
    shown = " ".join(f"{r:.2f}" for r in ratios)
    print(f"P={P} C={C} K={K}: {median(ratios):.2f} times faster (median of {rounds}: {shown})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
