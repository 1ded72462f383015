"""Small random models of the ten families, and prompts made by hand as their processors make them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

from cwdpo.data.encode.encoder import EncodedCompletion, EncodedExample, EncodedPrompt

FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "llava", "llava_next", "llava_onevision",
    "internvl", "gemma3",
)  # fmt: skip
IMAGE = 500
TEXT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
TILES = [[56, 56], [56, 112], [112, 56]]


def distributions(model: Any, batch: Any) -> torch.Tensor:
    """Log-probabilities over the vocabulary of all completion tokens, [M, V], by the path the model is switched to."""
    from cwdpo.scoring.score import score

    with torch.no_grad():
        whole = score(model, batch, whole=torch.ones(len(batch.completions), dtype=torch.bool)).whole
    assert whole is not None
    return whole


def config(name: str) -> Any:
    """The configuration of a model with four text layers and three vision layers."""
    if name.startswith("qwen"):
        return _qwen(name)
    if name in ("smolvlm", "idefics3"):
        cls = t.SmolVLMConfig if name == "smolvlm" else t.Idefics3Config
        return cls(
            text_config={**TEXT, "model_type": "llama"},
            vision_config=SIGLIP,
            image_token_id=IMAGE,
            scale_factor=2,
        )
    clip = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}
    if name == "llava":
        return t.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"}, vision_config=clip, image_token_index=IMAGE,
            image_seq_length=16, vision_feature_select_strategy="default", vision_feature_layer=-2,
        )  # fmt: skip
    if name == "llava_next":
        return t.LlavaNextConfig(
            text_config={**TEXT, "model_type": "llama"}, vision_config=clip, image_token_index=IMAGE,
            image_grid_pinpoints=TILES,
        )  # fmt: skip
    if name == "llava_onevision":
        return t.LlavaOnevisionConfig(
            text_config={**TEXT, "model_type": "qwen2"},
            vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=IMAGE, video_token_index=IMAGE + 1, image_grid_pinpoints=TILES,
        )  # fmt: skip
    if name == "internvl":
        return t.InternVLConfig(
            text_config={**TEXT, "model_type": "qwen2"},
            vision_config={
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": [56, 56], "patch_size": [14, 14],
            },
            image_token_id=IMAGE, image_seq_length=4, tie_word_embeddings=False,
        )  # fmt: skip
    assert name == "gemma3"
    return t.Gemma3Config(
        text_config={
            **TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision_config={**SIGLIP, "vision_use_head": False},
        mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=IMAGE + 2, eoi_token_index=IMAGE + 3,
    )  # fmt: skip


def spread(model: Any, seed: int) -> Any:
    """Give a model weights far enough from zero that token probabilities differ; returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model


def _qwen(name: str) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text: dict[str, Any] = {**TEXT, "rope_parameters": rope}
    tokens = {
        "image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
    }  # fmt: skip
    patches = {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if name == "qwen3_vl":
        rope["mrope_interleaved"] = True
        vision = {
            **patches, "depth": 4, "hidden_size": 32, "intermediate_size": 64, "patch_size": 16,
            "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2],
        }  # fmt: skip
        return t.Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config=vision, **tokens)
    if name == "qwen2_vl":
        vision = {
            **patches, "depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14,
            "in_channels": 3,
        }  # fmt: skip
        return t.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    vision = {
        **patches, "depth": 3, "hidden_size": 32, "intermediate_size": 64, "patch_size": 14,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [2],
    }  # fmt: skip
    return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)


def build(name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights are far enough from zero that every part of it matters."""
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(
        config(name), attn_implementation=attention, dtype=dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def _image(name: str, images: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    """Vision inputs of one prompt, and how many image tokens each picture takes."""

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name.startswith("qwen"):
        patch = 16 if name == "qwen3_vl" else 14
        grid = torch.tensor([[1, 4, 8]] * images)
        return {"pixel_values": pixels(32 * images, 3 * 2 * patch * patch), "image_grid_thw": grid}, 8
    if name in ("smolvlm", "idefics3"):
        return {"pixel_values": pixels(1, images, 3, 56, 56)}, 4
    if name in ("llava_next", "llava_onevision"):
        # A picture of two tiles and its thumbnail; several pictures in a prompt are not tiled by OneVision.
        tiled = name == "llava_next" or images == 1
        inputs = {
            "pixel_values": pixels(images, 3 if tiled else 1, 3, 56, 56),
            "image_sizes": torch.tensor([[56, 112]] * images),
        }
        if name == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor([images])
        return inputs, -1
    return {"pixel_values": pixels(images, 3, 56, 56)}, {"llava": 16, "internvl": 4, "gemma3": 16}[name]


def prompt(
    name: str, model: Any, *, images: int = 1, before: int = 5, after: int = 7, seed: int = 1
) -> EncodedPrompt:
    """A prompt of random text around its pictures."""
    generator = torch.Generator().manual_seed(seed)
    inputs, each = _image(name, images, generator) if images else ({}, 0)
    if each < 0:
        with torch.no_grad():
            features = model.get_image_features(**inputs, return_dict=True).pooler_output
        counts = [len(f) for f in features]
    else:
        counts = [each] * images

    def words(n: int) -> list[int]:
        return torch.randint(3, 400, (n,), generator=generator).tolist()

    ids = words(before)
    for count in counts:
        ids += [IMAGE] * count + words(2)
    ids += words(after)
    rows = {"gemma3": ("token_type_ids",)}.get(
        name, ("mm_token_type_ids",) if name.startswith("qwen") else ()
    )
    kinds = tuple(int(token == IMAGE) for token in ids)
    digest = f"{name} {images} {seed}" if images else ""
    return EncodedPrompt(tuple(ids), dict.fromkeys(rows, kinds), lambda: inputs, digest)


def example(name: str, model: Any, lengths: tuple[int, ...], seed: int = 1, **shape: int) -> EncodedExample:
    """A prompt with a chosen completion and negatives of the given lengths (tokens)."""
    generator = torch.Generator().manual_seed(100 + seed)
    chosen, *negatives = (
        EncodedCompletion(
            tuple(torch.randint(3, 400, (n,), generator=generator).tolist()), span=(0, n), kind=f"k{i}"
        )
        for i, n in enumerate(lengths)
    )
    return EncodedExample(f"{name}-{seed}", prompt(name, model, seed=seed, **shape), chosen, tuple(negatives))


def ragged(name: str, model: Any, negatives: int = 1) -> list[EncodedExample]:
    """Three prompts of different lengths, one of them with two pictures and one without any."""
    lengths = [(9, 13, 5, 8), (4, 11, 7, 2), (2, 1, 12, 6)]
    cut = [one[: negatives + 1] for one in lengths]
    return [
        example(name, model, cut[0], seed=1),
        example(name, model, cut[1], seed=2, images=2, before=9, after=14),
        example(name, model, cut[2], seed=3, images=0, before=3, after=3),
    ]
