"""Small random models of nine families, and one hand-built prompt of each; no processor is needed."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from cwdpo.data.encode import EncodedPrompt

IMAGE = 500
HIDDEN = 64
TEXT = {
    "vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}  # fmt: skip
FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "llava", "llava_onevision", "internvl", "gemma3",
)  # fmt: skip


def _qwen(name: str) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text: dict[str, Any] = {**TEXT, "rope_parameters": rope}
    vision = {"num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if name == "qwen2_vl":
        vision |= {"depth": 3, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "in_channels": 3}
        return t.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN}
    if name == "qwen2_5_vl":
        vision |= {"depth": 3, "window_size": 56, "fullatt_block_indexes": [2]}
        return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
    vision |= {
        "depth": 4,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2],
    }
    return t.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _config(name: str) -> Any:
    if name.startswith("qwen"):
        return _qwen(name)
    if name in ("smolvlm", "idefics3"):
        kind = t.SmolVLMConfig if name == "smolvlm" else t.Idefics3Config
        text = {**TEXT, "model_type": "llama"}
        return kind(text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, scale_factor=2)
    if name == "llava":
        return t.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-2,
        )  # fmt: skip
    if name == "llava_onevision":
        return t.LlavaOnevisionConfig(
            text_config={**TEXT, "model_type": "qwen2"},
            vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=IMAGE, video_token_index=IMAGE + 1, image_grid_pinpoints=[[56, 56], [56, 112]],
        )  # fmt: skip
    if name == "internvl":
        vision = {**SIGLIP, "num_hidden_layers": 2, "image_size": [56, 56], "patch_size": [14, 14]}
        return t.InternVLConfig(
            text_config={**TEXT, "model_type": "qwen2"}, vision_config=vision, image_token_id=IMAGE,
            image_seq_length=4, tie_word_embeddings=False,
        )  # fmt: skip
    assert name == "gemma3"
    layers = ["sliding_attention", "full_attention"] * 2
    return t.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "layer_types": layers},
        vision_config={**SIGLIP, "vision_use_head": False}, mm_tokens_per_image=16, image_token_index=IMAGE,
        boi_token_index=IMAGE + 2, eoi_token_index=IMAGE + 3,
    )  # fmt: skip


def build(name: str) -> Any:
    """A model with weights far enough from zero that its greedy tokens vary."""
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(_config(name), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _pictures(name: str, generator: torch.Generator, model: Any) -> tuple[dict[str, Tensor], int]:
    """Vision inputs of one picture, and its number of image tokens."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name.startswith("qwen"):
        side = 16 if name == "qwen3_vl" else 14
        return {"pixel_values": noise(32, 6 * side * side), "image_grid_thw": torch.tensor([[1, 4, 8]])}, 8
    if name in ("smolvlm", "idefics3"):
        return {"pixel_values": noise(1, 1, 3, 56, 56)}, 4
    if name == "llava_onevision":
        images = {"pixel_values": noise(1, 3, 3, 56, 56), "image_sizes": torch.tensor([[56, 112]])}
        with torch.no_grad():
            features = model.get_image_features(**images, return_dict=True).pooler_output
        return images, sum(f.shape[0] for f in features)
    return {"pixel_values": noise(1, 3, 56, 56)}, {"llava": 16, "internvl": 4, "gemma3": 16}[name]


def prompt(name: str, model: Any, seed: int = 1, before: int = 5, after: int = 7) -> EncodedPrompt:
    """Some tokens, one picture, some tokens."""
    generator = torch.Generator().manual_seed(seed)
    head, tail = (torch.randint(3, 400, (k,), generator=generator).tolist() for k in (before, after))
    images, tokens = _pictures(name, generator, model)
    ids = (*head, *[IMAGE] * tokens, *tail)
    key = "mm_token_type_ids" if name.startswith("qwen") else "token_type_ids" if name == "gemma3" else None
    rows = {} if key is None else {key: tuple(int(i == IMAGE) for i in ids)}
    return EncodedPrompt(ids, rows, lambda: images)
