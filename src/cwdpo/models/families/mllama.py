"""Llama 3.2 Vision: images are used by cross-attention, with a mask that has a row for each text token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.models.families.base import Family

_MASK = "cross_attention_mask"


class Mllama(Family):
    """The processor makes the mask of the prompt; completion tokens get the mask row of the prompt's last token."""

    token_inputs = (_MASK,)

    def group(self, model: Any, prompt: EncodedPrompt) -> int:
        """The number of the prompt's images.

        A prompt without images passes through fewer layers. And tokens before the first image attend to all images of
        the row with the most images in the batch, padding included; so rows of a batch need the same number.
        """
        return prompt.input_ids.count(model.config.image_token_id)

    def fit(
        self,
        images: Mapping[str, Tensor],
        prompts: Sequence[EncodedPrompt],
        width: int,
        *,
        left: bool = False,
    ) -> dict[str, Tensor]:
        """See :meth:`Family.fit`."""
        if _MASK not in images:
            return dict(images)
        made = images[_MASK]  # [rows, longest prompt, images, tiles]
        out = made.new_zeros(len(made), width, *made.shape[2:])
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            own = made[row, :length]
            if left:
                out[row, width - length :] = own
            else:
                out[row] = torch.cat([own, own[-1:].expand(width - length, -1, -1)])
        return {**images, _MASK: out}
