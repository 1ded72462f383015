"""The chosen response under a small part of its image.

Source: Wang et al., "mDPO: Conditional Preference Optimization for Multimodal Large Language Models" (arXiv
2406.11839): a random crop of at most a fifth of the image, scaled to the whole image's size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from cwdpo.negatives.base import NegativeSource
from cwdpo.negatives.image_side import edited
from cwdpo.records import Completion, Example, ImageEdit

_ASPECTS = (3 / 4, 4 / 3)
"""Ratio of the crop's width to its height, relative to the image's; as in torchvision's RandomResizedCrop."""


class ImageCropNegatives(NegativeSource):
    """At most one negative of kind ``image_crop``; each of the prompt's images is cropped on its own.

    Args:
        area: smallest and largest share of the image's area that the crop keeps.
    """

    image_side: ClassVar[bool] = True
    area: tuple[float, float] = Field((0.01, 0.2), description="smallest and largest share of the area")

    @field_validator("area")
    @classmethod
    def _shares(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError("allowed: two numbers with 0 < smallest <= largest <= 1")
        return area

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """Chosen's text under the crops; ``made["box"]`` has left, top, right and bottom of the first as shares."""
        del pool
        edits = [ImageEdit(box=self._box(rng)) for _ in example.images]
        return edited(example, "image_crop", edits, {"box": edits[0].box} if edits else {})

    def _box(self, rng: random.Random) -> tuple[float, float, float, float]:
        area = rng.uniform(*self.area)
        ratio = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        return left, top, min(1.0, left + width), min(1.0, top + height)
