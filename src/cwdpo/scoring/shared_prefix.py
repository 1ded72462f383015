"""Shared-prefix scoring: image and prompt are processed once for all completions; faster than plain scoring.

A row is ``[prompt | completion | completion | ...]``. The positions of each completion continue those of the prompt,
and a completion attends to the prompt and to itself only. So every token gets the log-probability that
:mod:`cwdpo.scoring.plain` computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.models.families.base import Rows
from cwdpo.models.inputs import device_of, padded, unwrapped
from cwdpo.models.shared_attention import model_family
from cwdpo.models.vision_cache import vision_inputs
from cwdpo.scoring.token_logp import HeadRequest


def rows_of(batch: PromptBatch, device: torch.device) -> tuple[Rows, HeadRequest]:
    """The row layout of B prompts with their N completions, and the positions that predict completion tokens.

    The first token of a completion is predicted at the prompt's last token, every other token at the one before it.
    """
    members: list[list[int]] = [[] for _ in batch.prompts]
    for index, prompt in enumerate(batch.completion_prompt.tolist()):
        members[prompt].append(index)
    lengths = [len(p.input_ids) for p in batch.prompts]
    width = max(lengths)
    place: dict[int, tuple[int, int, int]] = {}  # row, column of the first token, the prompt's last column
    ids, segment, offset = [], [], []
    for row, prompt in enumerate(batch.prompts):
        completions: list[int] = []
        parts: list[int] = []
        offsets: list[int] = []
        for number, index in enumerate(members[row]):
            own = batch.completions[index].ids
            place[index] = row, width + len(completions), lengths[row] - 1
            completions += own
            parts += [number + 1] * len(own)
            offsets += range(len(own))
        ids.append([*prompt.input_ids, *[0] * (width - lengths[row]), *completions])
        segment.append(parts)
        offset.append(offsets)
    # Segments were numbered from 1 so that padding is 0; after the subtraction they start at 0 and padding is -1.
    rows = Rows(
        batch.prompts,
        padded(ids, device),
        torch.tensor(lengths, device=device),
        padded(segment, device) - 1,
        padded(offset, device),
    )
    where = []
    for index, completion in enumerate(batch.completions):
        row, first, last = place[index]
        where += [(row, first + t - 1 if t else last, token) for t, token in enumerate(completion.ids)]
    return rows, HeadRequest(*torch.tensor(where, dtype=torch.long).T)


def lay_out(model: nn.Module, batch: PromptBatch) -> tuple[dict[str, Any], HeadRequest]:
    """Model inputs with one row per prompt, and the positions that predict completion tokens.

    Returns:
        The model inputs: ``input_ids`` [B, L], ``position_ids`` [..., B, L], the family's ``attention_mask`` and image
        inputs, with L = longest prompt + most completion tokens of a prompt. And the request for all completion
        tokens, completion by completion.
    """
    device = device_of(model)
    rows, request = rows_of(batch, device)
    inner, family = unwrapped(model), model_family(model)
    assert family is not None
    images = vision_inputs(model, batch.prompts, device)
    positions = family.positions(inner, rows, images)
    inputs: dict[str, Any] = {
        "input_ids": rows.ids,
        "position_ids": positions,
        "attention_mask": family.masks(inner, rows, positions),
    }
    return inputs | family.fit(images, batch.prompts, rows.ids.shape[1]), request
