"""The chosen response under its image with Gaussian noise.

Source: the noise of Zhou et al., "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning"
(POVID, arXiv 2402.11411): the forward process of a diffusion model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from cwdpo.negatives.base import NegativeSource
from cwdpo.negatives.image_side import edited
from cwdpo.records import Completion, Example, ImageEdit


class ImageNoiseNegatives(NegativeSource):
    """At most one negative of kind ``image_noise``.

    Args:
        variance: of the noise, for pixel values scaled to -1..1; 0.25 is about step 500 of 1,000 in POVID's schedule.
    """

    image_side: ClassVar[bool] = True
    variance: float = Field(0.25, gt=0, le=1, description="of the noise, for values from -1 to 1")

    def completions(self, example: Example, pool: Sequence[Example], rng: random.Random) -> list[Completion]:
        """Chosen's text under the noisy images; ``made["variance"]`` is that of the noise."""
        del pool
        edits = [ImageEdit(noise=self.variance, seed=rng.getrandbits(32)) for _ in example.images]
        return edited(example, "image_noise", edits, {"variance": self.variance})
