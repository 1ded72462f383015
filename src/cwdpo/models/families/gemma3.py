"""Gemma 3: image tokens see one another, and most layers look back over a window only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cwdpo.models.families.base import Family, Rows, own_completion


class Gemma3(Family):
    """Brings whole masks of its own, [B, 1, P + M, P + M] for each kind of layer."""

    needs = ("token_type_ids",)
    windowed = True

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> dict[str, Tensor]:
        """By layer type; True where a token may look."""
        width, length = rows.prompt_width, rows.ids.shape[1]
        place = torch.arange(length, device=rows.ids.device)
        inside = place < rows.lengths[:, None]  # [B, L] tokens of the prompt
        see = (place[None, :] <= place[:, None]) & inside[:, None, :]
        see[:, width:, width:] = own_completion(rows)
        image = (rows.ids == model.config.image_token_id) & inside
        begins = image & ~pad(image, (1, 0))[:, :-1]
        picture = torch.where(image, begins.cumsum(1), 0)
        see |= (picture[:, :, None] == picture[:, None, :]) & image[:, None, :]
        window = model.config.get_text_config().sliding_window
        # Looking ahead, within an image, is never too far.
        near = positions[:, :, None] - positions[:, None, :] < window
        itself = torch.eye(length, dtype=torch.bool, device=rows.ids.device)  # padding must see something
        return {
            "full_attention": (see | itself)[:, None],
            "sliding_attention": (see & near | itself)[:, None],
        }


FAMILY = Gemma3()
