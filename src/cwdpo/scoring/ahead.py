"""Batches to score whose images are read ahead by worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from torch import nn

from cwdpo.data.encode.collate import PromptBatch
from cwdpo.data.encode.reading import read_ahead
from cwdpo.models.vision_cache import needs_images


def begun(model: nn.Module, batch: PromptBatch) -> PromptBatch:
    """The batch whose images are read from now on, as far as ``model`` needs them and the encoder has workers."""
    return batch.ahead(partial(needs_images, model))


def batches_ahead(model: nn.Module, batches: Iterable[PromptBatch]) -> Iterator[PromptBatch]:
    """The batches in order; the images of the next one are read while ``model`` scores one."""
    return read_ahead(batches, partial(begun, model), lambda batch: len(batch.prompts))
