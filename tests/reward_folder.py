"""A small random reward model in a folder."""

from __future__ import annotations

from pathlib import Path


def write_reward_model(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 classifier with one label that reads text only, and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from cwdpo.models.tiny import train_tokenizer

    tokenizer = train_tokenizer(["a dog what is it cat good bad"], 300)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
