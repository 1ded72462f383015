"""Positions on three axes (time, height, width), as in the Qwen-VL models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.models.families.base import Family, Rows


class MRope(Family):
    """M-RoPE: positions of the prompt come from the model's ``get_rope_index``; text continues at its maximum + 1.

    These models accept 1-D positions, or positions made without ``mm_token_type_ids``, without an error, but then give
    wrong log-probabilities.
    """

    needs = ("mm_token_type_ids",)

    def prompt_positions(self, model: Any, rows: Rows, images: Mapping[str, Tensor]) -> Tensor:
        """Position ids of the prompts, [3, B, P]."""
        width, device = rows.prompt_width, rows.ids.device
        text = torch.arange(width, device=device).expand(3, len(rows.prompts), -1)
        if not images:  # get_rope_index is for prompts with images or videos
            return text
        kinds = torch.zeros(len(rows.prompts), width, dtype=torch.int32)
        for row, prompt in enumerate(rows.prompts):
            kind = prompt.per_token.get("mm_token_type_ids", ())
            kinds[row, : len(kind)] = torch.tensor(kind, dtype=torch.int32)
        inside = torch.arange(width, device=device) < rows.lengths[:, None]
        grids = {
            name: value for name, value in images.items() if name.endswith(("grid_thw", "second_per_grid_ts"))
        }
        positions, _ = model.model.get_rope_index(
            rows.ids[:, :width], mm_token_type_ids=kinds.to(device), attention_mask=inside.long(), **grids
        )
        return torch.where(inside, positions, 0)


class Glm4v(MRope):
    """Frames of videos are image tokens, so the model takes either images or videos in one call."""

    def group(self, model: Any, prompt: EncodedPrompt) -> int:
        """1 for prompts with videos."""
        del model
        return int(prompt.n_videos > 0)
