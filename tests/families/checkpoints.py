"""Tiny random checkpoints in the layout of the hub, one of each family: its real processor class, a tokenizer with its
special tokens trained on the spot, a chat template with the traits of its real one (:mod:`templates`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import templates as written
import torch
import transformers as t

WORDS = (
    "What is shown here? A red square stands left of the blue circle, and a green triangle lies below them. "
    "Describe the picture in one sentence. There is nothing in it. The tag </s> is old; 7 of 12 things are yellow. "
    "USER: ASSISTANT: User: Assistant: system user assistant model You are a helpful assistant. [INST] [/INST] "
    "Be brief."
)
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3,
}  # fmt: skip
SQUARE = {"height": 56, "width": 56}
TILES = [[56, 56], [56, 112], [112, 56]]


@dataclass(frozen=True)
class Traits:
    """What differs between families, besides config and processor.

    ``special``: the tokenizer's special tokens, bos, eos and pad among them. ``named``: those that the processor
    asks the tokenizer for by name. ``stops``: what generation_config lists. ``end``: the text of the token that ends
    what is trained. ``opens``: what a finished turn has between generation prompt and response. ``style``: how the
    tokenizer splits (``bytes``, or ``metaspace`` like sentencepiece). ``adds_bos``: the tokenizer puts bos in front.
    ``shared``: whether rows share their prefix. ``refuses``: kinds of rows that the real template or processor
    refuses, with a part of what it says. ``text_roles``: whose contents must be text.
    """

    special: tuple[str, ...]
    eos: str
    end: str
    template: str | None
    stops: tuple[str, ...] = ()
    bos: str | None = None
    pad: str = ""
    named: dict[str, str] = field(default_factory=dict)
    opens: str = ""
    style: str = "bytes"
    adds_bos: bool = False
    shared: bool = True
    refuses: dict[str, str] = field(default_factory=dict)
    text_roles: tuple[str, ...] = ()


class Made:
    """A tokenizer under construction, with what configs and processors ask it for."""

    def __init__(self, traits: Traits) -> None:
        self.traits, self.tokenizer = traits, train_tokenizer(traits)

    def id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        assert found is not None, token
        return int(found)

    @cached_property
    def text(self) -> dict[str, Any]:
        """The text tower's settings that every family shares."""
        tokenizer = self.tokenizer
        return {
            **TEXT,
            "vocab_size": len(tokenizer) + 1300,  # PaliGemma's processor adds tokens; embeddings are padded
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }


def train_tokenizer(traits: Traits) -> Any:
    """A small BPE tokenizer on :data:`WORDS`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if traits.style == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        special = list(traits.special)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        first = "first" if traits.adds_bos and "<image>" in traits.special else "never"
        # Merges do not cross words, as in sentencepiece; afterwards nothing is split, as in the real files.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first, split=True)
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(
            [*pieces, decoders.Strip(" ", 1, 0)] if first == "first" else pieces
        )
        alphabet = [chr(c) for c in range(32, 127)]
        special = [*traits.special, "<unk>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)] if traits.style == "metaspace" else []
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=[*special, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    if traits.style == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first, split=False)
    if bytes_:  # byte tokens are tokens like others
        description = json.loads(backend.to_str())
        description["added_tokens"] = [a for a in description["added_tokens"] if a["content"] not in bytes_]
        backend = Tokenizer.from_str(json.dumps(description))
    if traits.adds_bos:
        assert traits.bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{traits.bos} $A",
            pair=f"{traits.bos} $A $B:1",
            special_tokens=[(traits.bos, backend.token_to_id(traits.bos))],
        )
    others = [
        s for s in special if s not in (traits.bos, traits.eos, traits.pad, *traits.named.values(), "<unk>")
    ]
    return t.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=traits.bos,
        eos_token=traits.eos,
        pad_token=traits.pad or traits.eos,
        unk_token="<unk>" if traits.style == "metaspace" else None,
        additional_special_tokens=others,
        extra_special_tokens=traits.named,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


Maker = Callable[[Made], tuple[Any, Any]]
"""Config and processor around a tokenizer; the chat template is set by :func:`write`."""


# --- Qwen ------------------------------------------------------------------------------------------------

_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<|box_start|>", "<|box_end|>",
)  # fmt: skip


def _qwen_traits(template: str, **more: Any) -> Traits:
    ends: dict[str, Any] = {
        "eos": "<|im_end|>",
        "end": "<|im_end|>",
        "stops": ("<|im_end|>", "<|endoftext|>"),
    }
    return Traits(_QWEN_TOKENS, template=template, pad="<|endoftext|>", **ends, **more)


def _qwen_ids(made: Made) -> dict[str, Any]:
    return {
        "image_token_id": made.id("<|image_pad|>"),
        "video_token_id": made.id("<|video_pad|>"),
        "vision_start_token_id": made.id("<|vision_start|>"),
        "vision_end_token_id": made.id("<|vision_end|>"),
    }


_PATCHES = {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}


def _mrope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **more}


def _qwen2_processor(made: Made, cls: Any) -> Any:
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 8}
    return cls(t.Qwen2VLImageProcessor(size=size), made.tokenizer, t.Qwen2VLVideoProcessor())


def qwen2_vl(made: Made) -> tuple[Any, Any]:
    vision = {**_PATCHES, "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14}
    text = {**made.text, "rope_parameters": _mrope()}
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_ids(made))
    return config, _qwen2_processor(made, t.Qwen2VLProcessor)


def qwen2_5_vl(made: Made) -> tuple[Any, Any]:
    vision = {
        **_PATCHES, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 14,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {**made.text, "rope_parameters": _mrope()}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(made))
    return config, _qwen2_processor(made, t.Qwen2_5_VLProcessor)


def _qwen3_vision(**more: Any) -> dict[str, Any]:
    return {
        **_PATCHES, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 16, "out_hidden_size": 64,
        "num_position_embeddings": 64, **more,
    }  # fmt: skip


def _qwen3_processor(made: Made) -> Any:
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 8}
    images = t.Qwen2VLImageProcessor(
        size=size, patch_size=16, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    return t.Qwen3VLProcessor(images, made.tokenizer, t.Qwen3VLVideoProcessor())


def qwen3_vl(made: Made) -> tuple[Any, Any]:
    text = {**made.text, "head_dim": 16, "rope_parameters": _mrope(mrope_interleaved=True)}
    vision = _qwen3_vision(deepstack_visual_indexes=[0, 1])
    return t.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(made)), _qwen3_processor(made)


def qwen3_vl_moe(made: Made) -> tuple[Any, Any]:
    text = {
        **made.text, "head_dim": 16, "rope_parameters": _mrope(mrope_interleaved=True), "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24,  # not square: the hub holds experts the other way round
    }  # fmt: skip
    vision = _qwen3_vision(deepstack_visual_indexes=[0, 1])
    config = t.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_qwen_ids(made))
    return config, _qwen3_processor(made)


def qwen3_5(made: Made) -> tuple[Any, Any]:
    text = {
        **made.text, "head_dim": 32, "rope_parameters": _mrope(mrope_interleaved=True, partial_rotary_factor=0.5),
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    config = t.Qwen3_5Config(text_config=text, vision_config=_qwen3_vision(), **_qwen_ids(made))
    return config, _qwen3_processor(made)


# --- Idefics ---------------------------------------------------------------------------------------------

_ROWS = tuple(f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6))
_IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *_ROWS)


def _idefics(made: Made, config: Any, processor: Any, images: Any, **more: Any) -> tuple[Any, Any]:
    tower = {**TOWER, "image_size": 56, "patch_size": 14}
    built = config(
        text_config={**made.text, "model_type": "llama"}, vision_config=tower, scale_factor=2,
        image_token_id=made.id("<image>"), pad_token_id=made.tokenizer.pad_token_id,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    return built, processor(images(**sizes), made.tokenizer, image_seq_len=4, **more)


def smolvlm2(made: Made) -> tuple[Any, Any]:
    videos = t.SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56})
    return _idefics(
        made, t.SmolVLMConfig, t.SmolVLMProcessor, t.SmolVLMImageProcessor, video_processor=videos
    )


def idefics3(made: Made) -> tuple[Any, Any]:
    return _idefics(made, t.Idefics3Config, t.Idefics3Processor, t.Idefics3ImageProcessor)


# --- LLaVA -----------------------------------------------------------------------------------------------

_CLIP = {
    **TOWER, "model_type": "clip_vision_model", "projection_dim": 32, "image_size": 56, "patch_size": 14,
}  # fmt: skip


def llava(made: Made) -> tuple[Any, Any]:
    config = t.LlavaConfig(
        text_config={**made.text, "model_type": "llama"}, vision_config=_CLIP, image_seq_length=16,
        image_token_index=made.id("<image>"), vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    select: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, t.LlavaProcessor(images, made.tokenizer, patch_size=14, **select)


def llava_next(made: Made) -> tuple[Any, Any]:
    config = t.LlavaNextConfig(
        text_config={**made.text, "model_type": "mistral", "sliding_window": None}, vision_config=_CLIP,
        image_token_index=made.id("<image>"), image_grid_pinpoints=TILES,
    )  # fmt: skip
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=TILES
    )
    select: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, t.LlavaNextProcessor(images, made.tokenizer, patch_size=14, **select)


def llava_onevision(made: Made) -> tuple[Any, Any]:
    tower = {
        **TOWER, "model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = t.LlavaOnevisionConfig(
        text_config={**made.text, "model_type": "qwen2"}, vision_config=tower, image_grid_pinpoints=TILES,
        image_token_index=made.id("<image>"), video_token_index=made.id("<video>"),
    )  # fmt: skip
    images = t.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=TILES)
    videos = t.LlavaOnevisionVideoProcessor(size=SQUARE)
    return config, t.LlavaOnevisionProcessor(
        images, made.tokenizer, videos, num_image_tokens=16, vision_feature_select_strategy="full"
    )


def internvl3(made: Made) -> tuple[Any, Any]:
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [56, 56], "patch_size": [14, 14],
    }  # fmt: skip
    config = t.InternVLConfig(
        text_config={**made.text, "model_type": "qwen2"}, vision_config=tower, image_seq_length=4,
        image_token_id=made.id("<IMG_CONTEXT>"),
    )  # fmt: skip
    images = t.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
    videos = t.InternVLVideoProcessor(size=SQUARE)
    return config, t.InternVLProcessor(images, made.tokenizer, videos, image_seq_length=4)


# --- Gemma -----------------------------------------------------------------------------------------------

_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24, "head_dim": 16}
_SIGLIP = {**TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False}


def gemma3(made: Made) -> tuple[Any, Any]:
    config = t.Gemma3Config(
        text_config={**made.text, **_LAYERS, "query_pre_attn_scalar": 16}, vision_config=_SIGLIP,
        mm_tokens_per_image=4, image_token_index=made.id("<image_soft_token>"),
        boi_token_index=made.id("<start_of_image>"), eoi_token_index=made.id("<end_of_image>"),
    )  # fmt: skip
    images = t.Gemma3ImageProcessor(size=SQUARE)
    return config, t.Gemma3Processor(images, made.tokenizer, image_seq_length=4)


def gemma4(made: Made) -> tuple[Any, Any]:
    text = {
        **made.text, **_LAYERS, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": made.text["vocab_size"], "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
    }  # fmt: skip
    vision = {
        **{k: v for k, v in TOWER.items() if k != "num_channels"}, "num_key_value_heads": 2, "head_dim": 16,
        "patch_size": 16, "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    tokens = {
        "image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
        "audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>",
        "video_token_id": "<|video|>",
    }  # fmt: skip
    ids = {name: made.id(token) for name, token in tokens.items()}
    config = t.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)
    images = t.Gemma4ImageProcessor(max_soft_tokens=70, pooling_kernel_size=2)
    videos = t.Gemma4VideoProcessor(max_soft_tokens=70, pooling_kernel_size=2)
    return config, t.Gemma4Processor(
        t.Gemma4AudioFeatureExtractor(), images, made.tokenizer, videos, image_seq_length=70
    )


def paligemma(made: Made) -> tuple[Any, Any]:
    config = t.PaliGemmaConfig(
        text_config={**made.text, "model_type": "gemma", "head_dim": 16}, projection_dim=64,
        vision_config={**_SIGLIP, "projection_dim": 64, "model_type": "siglip_vision_model"},
        image_token_index=made.id("<image>"),
    )  # fmt: skip
    images = t.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    return config, t.PaliGemmaProcessor(images, made.tokenizer)


# --- Mistral ---------------------------------------------------------------------------------------------

_MISTRAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "<pad>",
)  # fmt: skip
_PIXTRAL = {**TOWER, "model_type": "pixtral", "image_size": 112, "patch_size": 14}


def _pixtral_processor(made: Made, merge: int) -> Any:
    images = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return t.PixtralProcessor(images, made.tokenizer, patch_size=14, spatial_merge_size=merge)


def pixtral(made: Made) -> tuple[Any, Any]:
    config = t.LlavaConfig(
        text_config={**made.text, "model_type": "mistral", "sliding_window": None, "head_dim": 16},
        vision_config=_PIXTRAL, image_token_index=made.id("[IMG]"), image_seq_length=1,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return config, _pixtral_processor(made, 1)


def mistral3(made: Made) -> tuple[Any, Any]:
    config = t.Mistral3Config(
        text_config={**made.text, "model_type": "mistral", "sliding_window": None, "head_dim": 16},
        vision_config=_PIXTRAL, image_token_index=made.id("[IMG]"), spatial_merge_size=2,
    )  # fmt: skip
    return config, _pixtral_processor(made, 2)


# --- Others ----------------------------------------------------------------------------------------------


def mllama(made: Made) -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_output_dim": 96, "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
    }  # fmt: skip
    # Its embedding has 8 more rows than its head: <|image|> lies there.
    vocabulary = made.id("<|image|>")
    text = {**made.text, "vocab_size": vocabulary, "cross_attention_layers": [1], "num_hidden_layers": 3}
    config = t.MllamaConfig(text_config=text, vision_config=vision, image_token_index=made.id("<|image|>"))
    return config, t.MllamaProcessor(t.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), made.tokenizer)


def glm4v(made: Made) -> tuple[Any, Any]:
    vision = {
        **_PATCHES, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 14, "image_size": 56,
        "out_hidden_size": 64,
    }  # fmt: skip
    text = {**made.text, "rope_parameters": _mrope(partial_rotary_factor=0.5, mrope_section=[1, 1, 2])}
    config = t.Glm4vConfig(
        text_config=text, vision_config=vision, image_token_id=made.id("<|image|>"),
        video_token_id=made.id("<|video|>"), image_start_token_id=made.id("<|begin_of_image|>"),
        image_end_token_id=made.id("<|end_of_image|>"), video_start_token_id=made.id("<|begin_of_video|>"),
        video_end_token_id=made.id("<|end_of_video|>"),
    )  # fmt: skip
    images = t.Glm4vImageProcessor(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 16})
    return config, t.Glm4vProcessor(images, made.tokenizer, t.Glm4vVideoProcessor())


def lfm2_vl(made: Made) -> tuple[Any, Any]:
    text = {
        **made.text, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_ff_dim": 96,
        "block_multiple_of": 8, "block_auto_adjust_ff_dim": False,
    }  # fmt: skip
    tower = {**TOWER, "model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 64}
    config = t.Lfm2VlConfig(
        text_config=text, vision_config={**tower, "vision_use_head": False}, image_token_id=made.id("<image>"),
        projector_hidden_size=64, downsample_factor=2,
    )  # fmt: skip
    images = t.Lfm2VlImageProcessor(
        tile_size=64, size={"height": 64, "width": 64}, min_image_tokens=2, max_image_tokens=8, max_tiles=2,
        max_num_patches=32,
    )  # fmt: skip
    return config, t.Lfm2VlProcessor(images, made.tokenizer)


_LLAVA: dict[str, Any] = {
    "special": ("<unk>", "<s>", "</s>", "<image>", "<pad>"), "bos": "<s>", "eos": "</s>", "end": "</s>", "pad": "<pad>",
    "style": "metaspace", "adds_bos": True, "named": {"image_token": "<image>"}, "stops": ("</s>",),
}  # fmt: skip
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>")
_MISTRAL: dict[str, Any] = {
    "special": _MISTRAL_TOKENS, "bos": "<s>", "eos": "</s>", "end": "</s>", "pad": "<pad>", "stops": ("</s>",),
    "adds_bos": True,
}  # fmt: skip
_IMEND: dict[str, Any] = {"eos": "<|im_end|>", "end": "<|im_end|>", "stops": ("<|im_end|>",)}
ONE_PICTURE = {"pictures": "number of"}

FAMILIES: dict[str, tuple[Maker, Traits]] = {
    "qwen2_vl": (qwen2_vl, _qwen_traits(written.QWEN2)),
    "qwen2_5_vl": (qwen2_5_vl, _qwen_traits(written.QWEN2)),
    "qwen3_vl": (qwen3_vl, _qwen_traits(written.QWEN3)),
    "qwen3_vl_moe": (qwen3_vl_moe, _qwen_traits(written.QWEN3)),
    "qwen3_5": (qwen3_5, _qwen_traits(written.QWEN3_5, opens="\n</think>\n\n", shared=False)),
    "smolvlm2": (
        smolvlm2,
        Traits(
            ("<|endoftext|>", "<|im_start|>", *_IDEFICS_TOKENS), "<end_of_utterance>", "<end_of_utterance>",
            written.SMOLVLM, ("<end_of_utterance>",), "<|im_start|>", "<|endoftext|>",
            {
                "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
            },
            opens=" ",
        ),
    ),
    "idefics3": (
        idefics3,
        Traits(
            ("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", *_IDEFICS_TOKENS), "<|end_of_text|>",
            "<end_of_utterance>", written.IDEFICS3, ("<|end_of_text|>", "<end_of_utterance>"), "<|begin_of_text|>",
            "<|end_of_text|>", opens=" ", adds_bos=True,
        ),
    ),
    "llava": (llava, Traits(**_LLAVA, template=written.LLAVA, opens=" ")),
    "llava_next": (llava_next, Traits(**_LLAVA, template=written.LLAVA_NEXT, opens=" ")),
    "llava_onevision": (
        llava_onevision,
        Traits(
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"), template=written.LLAVA_ONEVISION,
            pad="<|endoftext|>", named={"image_token": "<image>", "video_token": "<video>"}, **_IMEND,
        ),
    ),
    "internvl3": (
        internvl3,
        Traits(
            (
                "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
            ),
            template=written.INTERNVL, pad="<|endoftext|>", **_IMEND,
            named={
                "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        ),
    ),
    "gemma3": (
        gemma3,
        Traits(
            (
                *_GEMMA_TOKENS, "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
                "<image_soft_token>",
            ),
            "<eos>", "<end_of_turn>", written.GEMMA3, ("<eos>", "<end_of_turn>"), "<bos>", "<pad>",
            {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
            style="metaspace", adds_bos=True,
        ),
    ),
    "gemma4": (
        gemma4,
        Traits(
            (
                *_GEMMA_TOKENS, "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>",
                "<|audio|>", "<|video|>",
            ),
            "<eos>", "<turn|>", written.GEMMA4, ("<eos>", "<turn|>"), "<bos>", "<pad>",
            {
                "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
                "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
            },
            style="metaspace", adds_bos=True,
        ),
    ),
    "paligemma": (
        paligemma,
        Traits(
            (*_GEMMA_TOKENS, "<image>"), "<eos>", "<eos>", None, ("<eos>",), "<bos>", "<pad>",
            {"image_token": "<image>"}, style="metaspace",
            refuses={"text": "images", "turns": "one user turn", "system": "one user turn"},
        ),
    ),
    "pixtral": (
        pixtral,
        Traits(**_MISTRAL, template=written.PIXTRAL, text_roles=("assistant", "system")),
    ),
    "mistral3": (mistral3, Traits(**_MISTRAL, template=written.MISTRAL3)),
    "mllama": (
        mllama,
        Traits(
            (
                "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                "<|eom_id|>", "<|finetune_right_pad_id|>", "<|python_tag|>",
            ),
            "<|eot_id|>", "<|eot_id|>", written.MLLAMA, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
            "<|begin_of_text|>", "<|finetune_right_pad_id|>", adds_bos=True,
            refuses={"system": "incompatible with system messages"},
        ),
    ),
    "glm4v": (
        glm4v,
        Traits(
            (
                "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
                "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>",
                "<|video|>",
            ),
            "<|endoftext|>", "<|user|>", written.GLM4V, ("<|endoftext|>", "<|user|>", "<|observation|>"), None,
            "<|endoftext|>", text_roles=("assistant",),
        ),
    ),
    "lfm2_vl": (
        lfm2_vl,
        Traits(
            (
                "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>",
                "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>",
                *(f"<|img_row_{i}_col_{j}|>" for i in range(1, 11) for j in range(1, 11)),
            ),
            template=written.LFM2_VL, bos="<|startoftext|>", pad="<|pad|>", **_IMEND,
            named={
                "image_token": "<image>", "image_start_token": "<|image_start|>",
                "image_end_token": "<|image_end|>", "image_thumbnail_token": "<|img_thumbnail|>",
            },
            shared=False, adds_bos=True,
        ),
    ),
}  # fmt: skip


def write(name: str, folder: Path, ends: float = 1.0) -> Path:
    """Write the checkpoint of a family; its weights are far from zero, so that every part of it matters.

    Args:
        ends: factor of the end token's row in the head; responses of a random model would hardly ever end.
    """
    maker, traits = FAMILIES[name]
    made = Made(traits)
    if name == "mllama":
        made.tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    config, processor = maker(made)
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
            elif parameter.numel() == 1:  # Mllama's gates are closed in a fresh model
                parameter.fill_(0.5)
    with torch.no_grad():
        model.get_output_embeddings().weight[made.id(traits.end)] *= ends
    tokenizer = made.tokenizer
    model.generation_config = t.GenerationConfig(
        eos_token_id=[made.id(token) for token in traits.stops],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(folder)
    processor.chat_template = traits.template
    processor.save_pretrained(folder)
    return folder
