"""Writes small random vision-language models (LLaVA) for smoke runs, tests, and the embedded base.

The folder has the same files as a hub checkpoint, so ``AutoModelForImageTextToText`` and
``AutoProcessor.from_pretrained`` load it unchanged, without torchvision.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cwdpo.errors import ModelError
from cwdpo.models.write import save_weights
from cwdpo.registry import Settings

IMAGE_TOKEN = "<image>"
VISION_HEADS = 4
SPECIAL_TOKENS = ("<pad>", "<s>", "<|end|>", IMAGE_TOKEN, "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TinyModelSettings(Settings):
    """Shape of a small LLaVA: a CLIP-style vision tower and a Llama-style language model."""

    image_size: int = 48
    patch_size: int = 12
    vision_width: int = 128
    vision_layers: int = 3
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 512
    max_positions: int = 512
    seed: int = 0


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``, as a ``PreTrainedTokenizerFast``.

    Args:
        texts: training texts of the tokenizer.
        vocabulary: number of tokens, with the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def init_model(folder: Path, texts: Iterable[str], settings: TinyModelSettings | None = None) -> Path:
    """Write a randomly initialised LLaVA with its processor and tokenizer to ``folder``.

    Args:
        folder: where to write; must be empty or absent.
        texts: texts to train the tokenizer on.
        settings: shape of the model.

    Raises:
        ModelError: the folder is not empty, or the shape is impossible.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty: choose another folder, or remove it first")
    settings = settings or TinyModelSettings()
    if settings.image_size % settings.patch_size:
        raise ModelError(f"patch_size {settings.patch_size} does not divide image_size {settings.image_size}")
    if settings.width % (2 * settings.heads) or settings.vision_width % VISION_HEADS:
        raise ModelError(
            f"width {settings.width} must be a multiple of 2 * heads = {2 * settings.heads}, and vision_width "
            f"{settings.vision_width} of {VISION_HEADS}"
        )
    import torch
    from transformers import LlavaForConditionalGeneration

    tokenizer = train_tokenizer(texts, settings.vocabulary)
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration(_config(settings, tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    _processor(settings, tokenizer).save_pretrained(folder)
    return folder


def _config(s: TinyModelSettings, tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=s.width,
        intermediate_size=s.width * 3,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=s.max_positions,
        tie_word_embeddings=True,
        **ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=s.vision_width,
        intermediate_size=s.vision_width * 3,
        num_hidden_layers=s.vision_layers,
        num_attention_heads=VISION_HEADS,
        image_size=s.image_size,
        patch_size=s.patch_size,
        projection_dim=s.width,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(s.image_size // s.patch_size) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **ids,
    )


def _processor(s: TinyModelSettings, tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    size = {"height": s.image_size, "width": s.image_size}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=s.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
