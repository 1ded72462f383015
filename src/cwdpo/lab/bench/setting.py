"""The setting of a benchmark: a Qwen2.5-VL of a given shape with random weights, and a prompt of exact length."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

from cwdpo.errors import RecipeError
from cwdpo.models.settings import LoraSettings, ModelSettings, QuantizationOptions

Shape = Literal["small", "3b", "7b"]
WORDS = 1000
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
HEAD, TAIL = (
    "<|im_start|> user <|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|> <|im_start|> assistant",
)
TEXT_MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
IMAGE_SHARE = 0.9  # of the prompt's tokens, as in photographs at their usual resolution


@dataclass(frozen=True)
class Setting:
    """One benchmark setting.

    Attributes:
        prompt_tokens, completion_tokens: exact lengths; nine tenths of the prompt are image tokens.
        negatives: number K of negatives.
        tune: ``lora`` on the linear layers of the language model, or ``full``.
        reference: ``cached`` uses stored reference values, ``live`` runs the reference model in every step.
        grad_checkpointing: recompute activations in the backward pass, in both trainers.
        shape: ``small`` for a CPU; ``3b`` and ``7b`` are the published sizes of Qwen2.5-VL.
        dtype: dtype of the weights.
        device: where to run.
        vision_cache: keep the image features of the frozen vision tower (``lora`` only).
        quantization: ``nf4`` for the linear layers of the language model (``lora`` only; needs bitsandbytes).
    """

    prompt_tokens: int = 1024
    completion_tokens: int = 64
    negatives: int = 1
    tune: Literal["lora", "full"] = "lora"
    reference: Literal["cached", "live"] = "cached"
    grad_checkpointing: bool = False
    shape: Shape = "small"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    vision_cache: bool = False
    quantization: Literal["nf4"] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens."""
        rows = max(2, math.isqrt(int(self.prompt_tokens * IMAGE_SHARE)))
        return rows, max(2, int(self.prompt_tokens * IMAGE_SHARE) // rows)


def processor() -> Any:
    """A Qwen2.5-VL processor that works offline, with one token per word; it does not need torchvision.

    Without torchvision there is no video processor. The processor's class requires one, but images do not need it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesOnly(Qwen2_5_VLProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if name == "video_processor":
                return None
            return super().check_argument_for_proper_class(name, argument)

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "user", "assistant"])}
    vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 1 << 14)
    return ImagesOnly(image_processor=images, tokenizer=fast, video_processor=None, chat_template="")


def rows(setting: Setting, tokenizer: Any) -> list[dict[str, Any]]:
    """K rows with TRL's columns that share prompt, image and chosen, each with another rejected response.

    Raises:
        RecipeError: the prompt is too short for its image.
    """
    import numpy as np
    from PIL import Image

    high, wide = setting.grid
    pixels = np.random.default_rng(0).integers(0, 255, (28 * high, 28 * wide, 3), dtype=np.uint8)
    fixed = len(tokenizer(f"{HEAD} {TAIL}", add_special_tokens=False)["input_ids"]) - 1 + high * wide
    if fixed > setting.prompt_tokens or setting.completion_tokens < 2:
        raise RecipeError(
            f"--prompt-tokens {setting.prompt_tokens}: must be at least 32, and --completion-tokens at least 2"
        )
    draw = random.Random(0)

    def words(n: int) -> str:
        return "".join(f" w{draw.randrange(WORDS)}" for _ in range(n))

    prompt = f"{HEAD}{words(setting.prompt_tokens - fixed)} {TAIL}"
    chosen = words(setting.completion_tokens - 1)  # and the end token
    return [
        {
            "prompt": prompt,
            "chosen": f"{chosen} <|im_end|>",
            "rejected": f"{words(setting.completion_tokens - 1)} <|im_end|>",
            "images": [Image.fromarray(pixels)],
        }
        for _ in range(setting.negatives)
    ]


def model_config(shape: Shape, tokenizer: Any) -> Any:
    """The config of a Qwen2.5-VL of a shape; published shapes are as in their ``config.json``."""
    from transformers import Qwen2_5_VLConfig

    ids = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {
        "small": {
            "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
            "num_attention_heads": 6, "num_key_value_heads": 2,
        },
        "3b": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2,
        },
        "7b": {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
    }[shape]  # fmt: skip
    head = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [head // 4, (head - head // 4) // 2, head - head // 4 - (head - head // 4) // 2]
    text |= {
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "pad_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>"), "bos_token_id": None,
    }  # fmt: skip
    small = shape == "small"
    vision = {
        "depth": 8 if small else 32, "hidden_size": 256 if small else 1280,
        "intermediate_size": 688 if small else 3420, "num_heads": 4 if small else 16, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": text["hidden_size"],
        "window_size": 112, "fullatt_block_indexes": [3, 7] if small else [7, 15, 23, 31],
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=shape == "3b",
    )


def model_settings(setting: Setting) -> ModelSettings:
    """The section ``model`` of a recipe that trains like this."""
    skip = QuantizationOptions(skip=("vision",) if setting.quantization else ())
    return ModelSettings(
        path="bench",
        dtype=setting.dtype,
        tune=setting.tune,
        lora=LoraSettings(r=16, alpha=32, target_modules=TEXT_MODULES),
        quantization=setting.quantization,
        quantization_options=skip,
    )


def build_model(setting: Setting, tokenizer: Any) -> Any:
    """The policy on its device in training mode; with LoRA, its adapter differs a little from the base."""
    import torch
    from transformers import AutoModelForImageTextToText

    from cwdpo.models.adapter import add_lora
    from cwdpo.models.quantization import use_exact_layers

    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForImageTextToText.from_config(
            model_config(setting.shape, tokenizer),
            attn_implementation="sdpa",
            dtype=getattr(torch, setting.dtype),
        )
    if setting.quantization is not None:
        _quantize(model)
        use_exact_layers(model, model_settings(setting))
    if setting.tune == "lora":
        model = add_lora(model, model_settings(setting))
        with torch.no_grad():  # with lora_B = 0 the gradients of lora_A would be 0
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 2e-3)
    if setting.grad_checkpointing:  # as Trainer.train() would
        model.activation_checkpointing_enable({"use_reentrant": False})
        if setting.tune == "lora":
            model.enable_input_require_grads()
    return model.train()


def _quantize(model: Any) -> None:
    """Put the language model's linear layers in nf4, where they are; transformers does so only while it loads."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(model.named_modules()):
        if not re.fullmatch(TEXT_MODULES, name):
            continue
        new = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new.to(layer.weight.device))
