"""LLaVA-OneVision: the videos of a call are one tensor, so all have the same number of frames."""

from __future__ import annotations

from typing import Any

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.models.families.base import Family


class LlavaOnevision(Family):
    """Padding frames would become tokens, so rows of a batch need videos of the same length."""

    def group(self, model: Any, prompt: EncodedPrompt) -> int:
        """The number of tokens of each of the prompt's videos, which have the same number of frames; 0 without any."""
        return prompt.input_ids.count(model.config.video_token_id) // max(prompt.n_videos, 1)
