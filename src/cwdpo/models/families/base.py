"""Shared-prefix rows (one prompt, several completions), and what differs between model families in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cwdpo.data.encode.encoder import EncodedPrompt
from cwdpo.errors import ModelError


@dataclass(frozen=True)
class Rows:
    """B rows, each ``[prompt, padded to P | its completions one after the other, padded to M]``.

    Attributes:
        prompts: the B prompts.
        ids: [B, P + M] token ids, 0 for padding.
        lengths: [B] number of tokens of each prompt.
        segment: [B, M] which of the row's completions a token belongs to; -1 for padding.
        offset: [B, M] position of a token within its completion.
    """

    prompts: Sequence[EncodedPrompt]
    ids: Tensor
    lengths: Tensor
    segment: Tensor
    offset: Tensor

    @property
    def prompt_width(self) -> int:
        """P: number of columns of the prompt part."""
        return int(self.ids.shape[1] - self.segment.shape[1])


class Family:
    """Positions and masks of shared-prefix rows. This default is for decoders with 1-D positions.

    ``needs``: per-token outputs of the processor from which the model makes its positions or masks. Without them, these
    models use wrong ones for a prompt with images, and raise no error.
    ``completion_types``: values of these outputs for completion tokens, if not 0.
    ``token_inputs``: vision inputs with one entry per text token.
    ``windowed``: whether the family's own masks cover sliding-window layers.
    ``caps_logits``: whether the model caps the logits of the output head (``final_logit_softcapping``).
    """

    needs: ClassVar[tuple[str, ...]] = ()
    completion_types: ClassVar[Mapping[str, int]] = {}
    token_inputs: ClassVar[tuple[str, ...]] = ()
    windowed: ClassVar[bool] = False
    caps_logits: ClassVar[bool] = False

    def check(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Refuse prompts that the model would score wrongly without an error.

        Raises:
            ModelError: the processor left out an output that the model needs for images.
        """
        for prompt in prompts:
            missing = [name for name in self.needs if prompt.image_digest and name not in prompt.per_token]
            if missing:
                raise ModelError(
                    f"the processor gives no {missing[0]} for a prompt with images; without it, this model would use "
                    f"wrong positions or masks; remove return_{missing[0]}: false from model.processor_options, or use "
                    "the checkpoint's own processor"
                )

    def group(self, model: Any, prompt: EncodedPrompt) -> int:
        """A number; only prompts with the same number may be in one batch. The default is one group for all."""
        del model, prompt
        return 0

    def token_rows(
        self, prompts: Sequence[EncodedPrompt], width: int, *, left: bool = False
    ) -> dict[str, Tensor]:
        """The processor's per-token outputs, each [N, width]: padded with 0 on the left, or else filled with the
        completion's value on the right.

        Args:
            prompts: the N prompts.
            width: number of columns.
            left: pad on the left (for sampling).
        """
        made: dict[str, Tensor] = {}
        for name in sorted({n for p in prompts for n in p.per_token}):
            fill = 0 if left else self.completion_types.get(name, 0)
            out = torch.full((len(prompts), width), fill)
            for row, prompt in enumerate(prompts):
                length = len(prompt.input_ids)
                own = torch.tensor(prompt.per_token.get(name, (0,) * length))
                out[row, slice(width - length, None) if left else slice(length)] = own
            made[name] = out
        return made

    def fit(
        self,
        images: Mapping[str, Tensor],
        prompts: Sequence[EncodedPrompt],
        width: int,
        *,
        left: bool = False,
    ) -> dict[str, Tensor]:
        """Vision inputs for rows of ``width`` tokens; those of ``token_inputs`` are padded to this width.

        Args:
            images: vision inputs of all rows in order.
            prompts, width, left: see :meth:`token_rows`.
        """
        del prompts, width, left
        return dict(images)

    def prompt_positions(self, model: Any, rows: Rows, images: Mapping[str, Tensor]) -> Tensor:
        """Position ids of the prompts, [B, P], or [3, B, P] for models with three axes.

        Args:
            model: the unwrapped model.
            rows: the rows.
            images: vision inputs of all prompts in order.
        """
        del model, images
        return torch.arange(rows.prompt_width, device=rows.ids.device).expand(len(rows.prompts), -1)

    def positions(self, model: Any, rows: Rows, images: Mapping[str, Tensor]) -> Tensor:
        """Position ids, [..., B, P + M]: each completion continues after the prompt, as if it were the only one."""
        prompt = self.prompt_positions(model, rows, images)
        last = prompt.gather(-1, (rows.lengths - 1).expand(*prompt.shape[:-2], -1)[..., None])[
            ..., 0
        ]  # [..., B]
        # Text continues after the last token's height and width; a long video's times may lie behind.
        last = last[1:].amax(0) if last.ndim == 2 else last
        completion = last[:, None] + 1 + rows.offset
        return torch.cat([prompt, completion.expand(*prompt.shape[:-1], -1)], dim=-1)

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> Any:
        """The model's ``attention_mask``: [B, 1, M, P + M], True where a completion token may attend.

        The prompt needs no mask: its attention is causal, and its padding is on the right. A completion attends to its
        prompt and causally to itself. Padding tokens attend to padding, so that no row of the softmax is empty.
        """
        del model, positions
        inside = torch.arange(rows.prompt_width, device=rows.ids.device) < rows.lengths[:, None]
        prompt = inside[:, None, :].expand(-1, rows.segment.shape[1], -1)
        return torch.cat([prompt, own_completion(rows)], dim=-1)[:, None]


def own_completion(rows: Rows) -> Tensor:
    """[B, M, M], True where a completion token may attend to a token of the same completion."""
    same = rows.segment[:, :, None] == rows.segment[:, None, :]
    return same.tril()
