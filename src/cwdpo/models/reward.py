"""Rewards of responses from a sequence classifier with one label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cwdpo.data.encode.render import Renderer
from cwdpo.errors import ModelError
from cwdpo.models.checkpoint import check_processor, quiet, reason
from cwdpo.records import Example, without_tools


class RewardModel:
    """A sequence classifier with one logit, which is the reward of a conversation.

    Args:
        source: folder or hub id with a processor (or a tokenizer, for text-only models).

    Raises:
        ModelError: the model cannot be loaded, or has more than one label.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoProcessor

        try:
            with quiet():
                self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                    source, use_safetensors=True
                ).eval()
                self.processor: Any = AutoProcessor.from_pretrained(source)
        except Exception as error:  # from_pretrained raises errors of many types
            raise ModelError(f"reward model {source!r} cannot be loaded: {reason(error)}") from error
        if self.model.config.num_labels != 1:
            raise ModelError(
                f"reward model {source!r} has {self.model.config.num_labels} labels: a reward is one number"
            )
        check_processor(self.processor, source)
        self._render = Renderer(self.processor)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        # With left padding, models that count positions from the first column would get shifted positions.
        self.tokenizer.padding_side = "right"
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def rewards(
        self, examples: Sequence[Example], texts: Sequence[str], *, batch_size: int = 8
    ) -> list[float]:
        """The reward (the one logit, float32) of each response to its example's prompt.

        Args:
            examples: prompts.
            texts: one response for each example.
            batch_size: conversations per forward pass.
        """
        rewards: list[float] = []
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            rows = [
                self._conversation(e, t) for e, t in zip(part, texts[start : start + batch_size], strict=True)
            ]
            inputs: dict[str, Any] = {"text": rows, "padding": True, "return_tensors": "pt"}
            if self.processor is not self.tokenizer:
                inputs["images"] = [[i.open() for i in e.images] for e in part]
            rewards += self.model(**self.processor(**inputs)).logits[:, 0].float().tolist()
        return rewards

    def _conversation(self, example: Example, text: str) -> str:
        if example.videos:
            raise ModelError(
                f"{example.where or example.id}: a reward model is not given videos: leave such rows out, or use "
                "another judge"
            )
        turns, tools = without_tools(example.prompt)
        chat = [m.as_chat() for m in turns]
        chat.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        if getattr(self.processor, "chat_template", None):
            return self._render(chat, generation=False, tools=tools)
        return f"{example.prompt_text}\n{text}"
