"""Families with tokens that see ahead: the pictures of Gemma 3 and 4, and the whole prompt of PaliGemma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cwdpo.models.families.base import Family, Rows, own_completion


def _causal(rows: Rows) -> Tensor:
    """[B, P + M, P + M] True where a token may look: back within its prompt and its own completion."""
    place = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    see = (place[None, :] <= place[:, None]) & _inside(rows)[:, None, :]
    see[:, rows.prompt_width :, rows.prompt_width :] = own_completion(rows)
    return see


def _inside(rows: Rows) -> Tensor:
    """[B, P + M] True on tokens of the prompt."""
    return torch.arange(rows.ids.shape[1], device=rows.ids.device) < rows.lengths[:, None]


def _itself(rows: Rows) -> Tensor:
    """[L, L]: padding must see something."""
    return torch.eye(rows.ids.shape[1], dtype=torch.bool, device=rows.ids.device)


def _within_pictures(model: Any, rows: Rows) -> Tensor:
    """[B, L, L] True between tokens of one picture."""
    image = (rows.ids == model.config.image_token_id) & _inside(rows)
    begins = image & ~pad(image, (1, 0))[:, :-1]
    picture = torch.where(image, begins.cumsum(1), 0)
    return (picture[:, :, None] == picture[:, None, :]) & image[:, None, :]


def _near(model: Any, positions: Tensor) -> Tensor:
    """[B, L, L] True within the window of sliding layers; looking ahead is never too far."""
    window: int = model.config.get_text_config().sliding_window
    return positions[:, :, None] - positions[:, None, :] < window


class Gemma3(Family):
    """Pictures see themselves in all layers; whole masks of its own, [B, 1, P + M, P + M] for each kind of layer."""

    needs = ("token_type_ids",)
    windowed = True

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> dict[str, Tensor]:
        """By layer type; True where a token may look."""
        see = _causal(rows) | _within_pictures(model, rows)
        return {
            "full_attention": (see | _itself(rows))[:, None],
            "sliding_attention": (see & _near(model, positions) | _itself(rows))[:, None],
        }


class Gemma4(Family):
    """Pictures see themselves in sliding layers only, and in the larger models only; logits are capped."""

    needs = ("mm_token_type_ids",)
    windowed = True
    caps_logits = True

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> dict[str, Tensor]:
        """By layer type; True where a token may look."""
        causal, sliding = _causal(rows), _causal(rows)
        if model.config.get_text_config().use_bidirectional_attention == "vision":
            sliding |= _within_pictures(model, rows)
        return {
            "full_attention": (causal | _itself(rows))[:, None],
            "sliding_attention": (sliding & _near(model, positions) | _itself(rows))[:, None],
        }


class PaliGemma(Family):
    """The whole prompt sees itself; token type 1 marks what is causal: the completion."""

    needs = ("token_type_ids",)
    caps_logits = True  # PaliGemma 2
    completion_types = {"token_type_ids": 1}  # noqa: RUF012 - a ClassVar of the base

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> Tensor:
        """[B, 1, P + M, P + M]; True where a token may look."""
        inside = _inside(rows)
        see = _causal(rows) | (inside[:, :, None] & inside[:, None, :])
        return (see | _itself(rows))[:, None]
