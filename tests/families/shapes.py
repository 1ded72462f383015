"""Writes a checkpoint folder of a published size of Qwen2.5-VL without weights, and rows, for `cwdpo plan` and `init`.

    python tests/families/shapes.py 7b FOLDER      writes FOLDER/Qwen2.5-VL-7B and FOLDER/data.jsonl

Needs the environment of `make test-families` (torchvision). The tokenizer is the tiny checkpoint's: it makes about one
token of a word of the rows. Image tokens are those of the real processor.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import transformers as t
from checkpoints import FAMILIES, WORDS, Made, _qwen_ids
from PIL import Image

from cwdpo.lab.bench.setting import model_config

SIZES = {
    # The text model as published; its vision tower is that of the smaller ones but for the widths.
    "72b": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "layer_types": ["full_attention"] * 80,
    },
    "7b": {},
    "3b": {},
}  # fmt: skip
ROWS = 320


def write_shape(size: str, folder: Path) -> Path:
    """``config.json``, tokenizer and processor of a Qwen2.5-VL; no weights."""
    made = Made(FAMILIES["qwen2_5_vl"][1])
    config = model_config("3b" if size == "3b" else "7b", made.tokenizer)
    for key, value in SIZES[size].items():
        setattr(config.text_config, key, value)
    if size == "72b":
        config.vision_config.intermediate_size, config.vision_config.out_hidden_size = 3456, 8192
    for key, value in _qwen_ids(made).items():
        setattr(config, key, value)
    config.dtype = "bfloat16"
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    target = folder / f"Qwen2.5-VL-{size.upper()}"
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    images = t.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    processor = t.Qwen2_5_VLProcessor(images, made.tokenizer, t.Qwen2VLVideoProcessor())
    processor.chat_template = FAMILIES["qwen2_5_vl"][1].template
    processor.save_pretrained(target)
    return target


def write_rows(folder: Path, rows: int = ROWS) -> Path:
    """Rows of made-up photographs of 640 x 480 to 1152 x 896 pixels, with responses of 30 to 70 words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(0), [w for w in WORDS.split() if w.isalpha()]
    lines: list[dict[str, Any]] = []
    for i in range(rows):
        size = 32 * draw.randint(20, 36), 32 * draw.randint(15, 28)
        name = f"{i}.jpg"
        Image.new("RGB", size, (i % 256, i // 256, 90)).save(folder / name)
        said = [draw.choice(words) for _ in range(draw.randint(30, 70))]
        other = [draw.choice(words) if draw.random() < 0.1 else word for word in said]
        lines.append(
            {
                "image": name,
                "prompt": "Describe the picture.",
                "chosen": " ".join(said),
                "rejected": " ".join(other) + " too",
            }
        )
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    place = Path(sys.argv[2])
    print(write_shape(sys.argv[1], place), write_rows(place))
