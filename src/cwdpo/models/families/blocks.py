"""Families with bidirectional attention in parts: images in Gemma 3 and 4, the whole prompt in PaliGemma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cwdpo.models.families.base import Family, Rows, own_completion


def _causal(rows: Rows) -> Tensor:
    """[B, P + M, P + M], True where a token may attend: causally, to its prompt and its own completion."""
    place = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    see = (place[None, :] <= place[:, None]) & _inside(rows)[:, None, :]
    see[:, rows.prompt_width :, rows.prompt_width :] = own_completion(rows)
    return see


def _inside(rows: Rows) -> Tensor:
    """[B, P + M], True for tokens of the prompt."""
    return torch.arange(rows.ids.shape[1], device=rows.ids.device) < rows.lengths[:, None]


def _itself(rows: Rows) -> Tensor:
    """[L, L] identity: padding must attend to something, else a row of the softmax is empty."""
    return torch.eye(rows.ids.shape[1], dtype=torch.bool, device=rows.ids.device)


def _within_images(model: Any, rows: Rows) -> Tensor:
    """[B, L, L], True between tokens of the same image, or of the same frame of a video."""
    names = ("image_token_id", "video_token_id")
    tokens = [token for name in names if (token := getattr(model.config, name, None)) is not None]
    image = torch.isin(rows.ids, torch.tensor(tokens, device=rows.ids.device)) & _inside(rows)
    begins = image & ~pad(image, (1, 0))[:, :-1]
    number = torch.where(image, begins.cumsum(1), 0)  # which image a token belongs to; 0: none
    return (number[:, :, None] == number[:, None, :]) & image[:, None, :]


def _near(model: Any, positions: Tensor) -> Tensor:
    """[B, L, L], True within the window of sliding-window layers; it limits only how far back a token attends."""
    window: int = model.config.get_text_config().sliding_window
    return positions[:, :, None] - positions[:, None, :] < window


class Gemma3(Family):
    """Image tokens attend to their whole image in all layers; one mask [B, 1, P + M, P + M] for each layer type."""

    needs = ("token_type_ids",)
    windowed = True

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> dict[str, Tensor]:
        """Masks by layer type; True where a token may attend."""
        see = _causal(rows) | _within_images(model, rows)
        return {
            "full_attention": (see | _itself(rows))[:, None],
            "sliding_attention": (see & _near(model, positions) | _itself(rows))[:, None],
        }


class Gemma4(Family):
    """Tokens attend to their whole image or frame in sliding-window layers of larger models; logits are capped."""

    needs = ("mm_token_type_ids",)
    windowed = True
    caps_logits = True

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> dict[str, Tensor]:
        """Masks by layer type; True where a token may attend."""
        causal, sliding = _causal(rows), _causal(rows)
        if model.config.get_text_config().use_bidirectional_attention == "vision":
            sliding |= _within_images(model, rows)
        return {
            "full_attention": (causal | _itself(rows))[:, None],
            "sliding_attention": (sliding & _near(model, positions) | _itself(rows))[:, None],
        }


class PaliGemma(Family):
    """Bidirectional attention in the whole prompt; token type 1 marks the causal part: the completion."""

    needs = ("token_type_ids",)
    caps_logits = True  # PaliGemma 2
    completion_types = {"token_type_ids": 1}  # noqa: RUF012 - a ClassVar of the base

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> Tensor:
        """[B, 1, P + M, P + M]; True where a token may attend."""
        inside = _inside(rows)
        see = _causal(rows) | (inside[:, :, None] & inside[:, None, :])
        return (see | _itself(rows))[:, None]
