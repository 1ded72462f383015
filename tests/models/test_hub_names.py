"""Tensors are written under the names that a family's checkpoints have on the hub, made from a config or loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo.models.write import save_weights, use_hub_names
from cwdpo.models.write_sharded import write_full

TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 60, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GEMMA = {"layer_types": ["full_attention"]}

# Family -> class, settings of text and vision, and a name of each part as the hub's checkpoints have it: the names
# that transformers' conversion tables and vLLM's loaders are written for.
LAYER = "layers.0.self_attn.q_proj.weight"
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "llava": ("Llava", {"model_type": "llama"}, CLIP, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight", "multi_modal_projector.linear_1.weight",
    )),
    "llava_next": ("LlavaNext", {"model_type": "mistral"}, CLIP, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight", "image_newline",
    )),
    "llava_onevision": ("LlavaOnevision", {"model_type": "qwen2"}, SIGLIP, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight", "image_newline",
    )),
    "gemma3": ("Gemma3", GEMMA, SIGLIP, (
        f"language_model.model.{LAYER}", "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "multi_modal_projector.mm_input_projection_weight",
    )),
    "paligemma": ("PaliGemma", {"model_type": "gemma2", "layer_types": ["full_attention"]}, SIGLIP, (
        f"language_model.model.{LAYER}", "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "multi_modal_projector.linear.weight",
    )),
    "pixtral": ("Llava", {"model_type": "mistral"}, {**TOWER, "model_type": "pixtral"}, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight", "vision_tower.patch_conv.weight",
        "vision_tower.transformer.layers.0.attention.q_proj.weight",
    )),
    "mistral3": ("Mistral3", {"model_type": "mistral"}, {**TOWER, "model_type": "pixtral"}, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight", "vision_tower.patch_conv.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
    )),
    "internvl3": ("InternVL", {"model_type": "qwen2"}, {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]}, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight",
        "vision_tower.embeddings.patch_embeddings.projection.weight", "multi_modal_projector.linear_1.weight",
    )),
    "mllama": ("Mllama", {"cross_attention_layers": [], "rope_parameters": {"rope_type": "default",
               "rope_theta": 1e4}}, {**TOWER, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
               "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}, (
        f"language_model.model.{LAYER}", "language_model.lm_head.weight", "vision_model.patch_embedding.weight",
        "multi_modal_projector.weight",
    )),
    "qwen2_vl": ("Qwen2VL", {"rope_parameters": MROPE}, {**QWEN, "embed_dim": 32, "hidden_size": 32}, (
        f"model.{LAYER}", "lm_head.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight",
    )),
    "qwen2_5_vl": ("Qwen2_5_VL", {"rope_parameters": MROPE}, {**QWEN, "hidden_size": 32, "intermediate_size": 32,
                   "out_hidden_size": 32, "fullatt_block_indexes": [0]}, (
        f"model.{LAYER}", "lm_head.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight",
    )),
    "qwen3_vl": ("Qwen3VL", {"rope_parameters": MROPE}, {**QWEN, "hidden_size": 32, "intermediate_size": 32,
                 "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}, (
        f"model.language_model.{LAYER}", "lm_head.weight", "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    )),
    "idefics3": ("Idefics3", {"model_type": "llama"}, TOWER, (
        f"model.text_model.{LAYER}", "lm_head.weight", "model.vision_model.embeddings.patch_embedding.weight",
        "model.connector.modality_projection.proj.weight",
    )),
    "smolvlm2": ("SmolVLM", {"model_type": "llama"}, TOWER, (
        f"model.text_model.{LAYER}", "lm_head.weight", "model.vision_model.embeddings.patch_embedding.weight",
        "model.connector.modality_projection.proj.weight",
    )),
    "glm4v": ("Glm4v", {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}, {**QWEN, "hidden_size": 32,
              "intermediate_size": 32, "out_hidden_size": 32, "image_size": 28}, (
        f"model.language_model.{LAYER}", "lm_head.weight", "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.proj.weight",
    )),
    "qwen3_vl_moe": ("Qwen3VLMoe", {"rope_parameters": MROPE, "num_experts": 2, "num_experts_per_tok": 1,
                     "moe_intermediate_size": 24}, {**QWEN, "hidden_size": 32, "intermediate_size": 32,
                     "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}, (
        f"model.language_model.{LAYER}", "lm_head.weight", "model.visual.blocks.0.attn.qkv.weight",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
    )),
    "qwen3_5": ("Qwen3_5", {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, "num_hidden_layers": 2,
                "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
                "linear_num_value_heads": 2, "layer_types": ["full_attention", "linear_attention"]},
                {**QWEN, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32,
                 "num_position_embeddings": 4}, (
        f"model.language_model.{LAYER}", "lm_head.weight", "model.visual.blocks.0.attn.qkv.weight",
        "model.language_model.layers.1.linear_attn.in_proj_qkv.weight",
    )),
    "gemma4": ("Gemma4", {**GEMMA, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 0},
               {**TOWER, "position_embedding_size": 16}, (
        f"model.language_model.{LAYER}", "model.vision_tower.patch_embedder.input_proj.weight",
        "model.embed_vision.embedding_projection.weight",
    )),
    "lfm2_vl": ("Lfm2Vl", {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["full_attention", "conv"]},
                {**TOWER, "model_type": "siglip2_vision_model", "num_patches": 4, "vision_use_head": False}, (
        f"model.language_model.{LAYER}", "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.multi_modal_projector.linear_1.weight", "model.language_model.layers.1.conv.in_proj.weight",
    )),
}  # fmt: skip
TRANSPOSED = {"model.language_model.layers.0.mlp.experts.gate_up_proj": (2, 32, 48)}
"""Experts, in, out on the hub; transformers holds experts, out, in."""


def made(family: str) -> Any:
    import transformers

    name, text, vision, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text}, vision_config=dict(vision), tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).float()


def names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def shape_of(folder: Path, name: str) -> tuple[int, ...]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return tuple(file.get_slice(name).get_shape())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_hubs_and_load_again(family: str, tmp_path: Path) -> None:
    model = made(family)
    save_weights(model, tmp_path / "made")
    written = names(tmp_path / "made")
    for name in FAMILIES[family][3]:
        if name not in written:
            tops = sorted({re.sub(r"\d+", "#", one) for one in written})
            pytest.fail(f"{name} is not among {tops}")
    for name, shape in TRANSPOSED.items():
        if name in written:
            assert shape_of(tmp_path / "made", name) == shape
    again, info = type(model).from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    save_weights(again, tmp_path / "again")
    assert names(tmp_path / "again") == written
    (tmp_path / "parts").mkdir()
    write_full(model, tmp_path / "parts")
    for file in (tmp_path / "made").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_large_model_is_written_to_several_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = made("llava").to(torch.bfloat16)
    use_hub_names(model)
    monkeypatch.setattr("cwdpo.models.write_sharded._LARGEST_FILE", "8KB")
    write_full(model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
