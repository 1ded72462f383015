"""How rows of one prompt and several completions are laid out: what may differ between model families."""

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
    """B rows, each ``[prompt, padded to P | its completions one behind the other, padded to M]``.

    Attributes:
        prompts: the B prompts.
        ids: [B, P + M] token ids, 0 where padded.
        lengths: [B] tokens of each prompt.
        segment: [B, M] which of the row's completions a token belongs to; -1 where padded.
        offset: [B, M] place of a token within its completion.
    """

    prompts: Sequence[EncodedPrompt]
    ids: Tensor
    lengths: Tensor
    segment: Tensor
    offset: Tensor

    @property
    def prompt_width(self) -> int:
        """P: columns of the prompt part."""
        return int(self.ids.shape[1] - self.segment.shape[1])


class Family:
    """Positions and masks of shared-prefix rows; the default suits decoders with 1-D positions.

    ``needs``: per-token rows that the model's positions or masks are made from. Where a prompt with images comes
    without them, these models go on silently with others.
    ``completion_types``: what those rows hold on the tokens of a completion, where it is not 0.
    ``token_inputs``: vision inputs that have a row for each token of the text.
    ``windowed``: whether sliding-window layers are covered by the family's own masks.
    ``caps_logits``: whether the model caps its logits behind the head by ``final_logit_softcapping``.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    completion_types: ClassVar[Mapping[str, int]] = {}
    token_inputs: ClassVar[tuple[str, ...]] = ()
    windowed: ClassVar[bool] = False
    caps_logits: ClassVar[bool] = False

    def check(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Refuse prompts that the model would score silently wrong, in any layout.

        Raises:
            ModelError: the processor left out a row that belongs to a prompt with images.
        """
        for prompt in prompts:
            missing = [name for name in self.needs if prompt.image_digest and name not in prompt.per_token]
            if missing:
                raise ModelError(
                    f"the processor gives no {missing[0]} for a prompt with images, and without it this model's "
                    f"positions or masks are silently others; remove return_{missing[0]}: false from "
                    "model.processor_options, or use the checkpoint's own processor"
                )

    def group(self, model: Any, prompt: EncodedPrompt) -> int:
        """Prompts of different groups are run in calls of their own; by default all are of one group."""
        del model, prompt
        return 0

    def token_rows(
        self, prompts: Sequence[EncodedPrompt], width: int, *, left: bool = False
    ) -> dict[str, Tensor]:
        """The processor's per-token rows, [N, width]: 0 before a prompt, the completion's value behind it.

        Args:
            prompts: of the N rows.
            width: columns.
            left: prompts stand at the right end, with padding before them (sampling).
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
        """Vision inputs of rows with ``width`` tokens; those of ``token_inputs`` are brought to that width.

        Args:
            images: of all rows in order.
            prompts, width, left: as for :meth:`token_rows`.
        """
        del prompts, width, left
        return dict(images)

    def prompt_positions(self, model: Any, rows: Rows, images: Mapping[str, Tensor]) -> Tensor:
        """Position ids of the prompts, [B, P], or [3, B, P] for models with three axes.

        Args:
            model: the unwrapped model.
            rows: the layout.
            images: the vision inputs of all prompts in order.
        """
        del model, images
        return torch.arange(rows.prompt_width, device=rows.ids.device).expand(len(rows.prompts), -1)

    def positions(self, model: Any, rows: Rows, images: Mapping[str, Tensor]) -> Tensor:
        """[..., B, P + M]: those of each completion go on behind the prompt, as if it stood there alone."""
        prompt = self.prompt_positions(model, rows, images)
        inside = torch.arange(rows.prompt_width, device=rows.ids.device) < rows.lengths[:, None]
        last = torch.where(inside, prompt, -1).amax(-1)  # [..., B]
        last = last.amax(0) if last.ndim == 2 else last  # the axes may have different ones
        completion = last[:, None] + 1 + rows.offset
        return torch.cat([prompt, completion.expand(*prompt.shape[:-1], -1)], dim=-1)

    def masks(self, model: Any, rows: Rows, positions: Tensor) -> Any:
        """What the model takes as ``attention_mask``: [B, 1, M, P + M], True where a completion token may look.

        The prompt needs none: its attention is causal, and what pads it stands behind it. A completion sees its
        prompt and, causally, itself; a padding token sees its kind, so that no row of the softmax is empty.
        """
        del model, positions
        inside = torch.arange(rows.prompt_width, device=rows.ids.device) < rows.lengths[:, None]
        prompt = inside[:, None, :].expand(-1, rows.segment.shape[1], -1)
        return torch.cat([prompt, own_completion(rows)], dim=-1)[:, None]


def own_completion(rows: Rows) -> Tensor:
    """[B, M, M] True where a token of a completion may look at one of the same completion."""
    same = rows.segment[:, :, None] == rows.segment[:, None, :]
    return same.tril()
