"""Llama 3.2 Vision: pictures are read by cross-attention, by a mask with a row for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.models.families.base import Family

_MASK = "cross_attention_mask"


class Mllama(Family):
    """The processor makes the mask for the prompt; a completion sees what the prompt's last token sees."""

    token_inputs = (_MASK,)

    def group(self, model: Any, prompt: EncodedPrompt) -> int:
        """The number of its pictures.

        A text without any passes through fewer layers, and what stands before the first picture looks at all pictures
        of the widest row in the batch, padding included.
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
        made = images[_MASK]  # [rows, longest prompt, pictures, tiles]
        out = made.new_zeros(len(made), width, *made.shape[2:])
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            own = made[row, :length]
            if left:
                out[row, width - length :] = own
            else:
                out[row] = torch.cat([own, own[-1:].expand(width - length, -1, -1)])
        return {**images, _MASK: out}
