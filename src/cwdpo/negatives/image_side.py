"""Image-side negatives: pairs that differ in the image instead of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cwdpo.files.stored import Chosen, select
from cwdpo.negatives.base import NEGATIVES
from cwdpo.negatives.mix import draw_negatives
from cwdpo.negatives.settings import NegativeSettings
from cwdpo.records import Completion, Example, ImageEdit


def with_image_negatives(
    examples: Sequence[Example], settings: NegativeSettings, seed: int, *, first: int | None = None
) -> Sequence[Example]:
    """Add ``image_per_prompt`` negatives of ``image_mix`` to the ``rejected`` of each example that has images.

    Args:
        examples: examples of one split; ``image_swap`` takes images from them.
        settings: the recipe's; without ``image_mix`` nothing changes.
        seed: together with the example's id, decides all random choices.
        first: only so many examples get any, the first ones.
    """
    shares = {name: share for name, share in settings.image_mix.items() if share > 0}
    if not shares:
        return examples
    built = settings.build_sources()
    sources = {name: built.get(name) or NEGATIVES.build(name) for name in shares}
    ids = [e.id for e in examples]
    pool = select(examples, sorted(range(len(ids)), key=ids.__getitem__))
    for source in sources.values():
        source.prepare(pool)
    changed = Chosen(examples)
    for i, example in enumerate(examples):
        if first is not None and i >= first:
            changed.keep(i)
            continue
        drawn = draw_negatives(example, pool, shares, sources, settings.image_per_prompt, seed)
        changed.append(replace(example, rejected=(*example.rejected, *(c for _, c in drawn))))
    return changed.records


def edited(
    example: Example, kind: str, edits: Sequence[ImageEdit], made: Mapping[str, Any]
) -> list[Completion]:
    """Chosen's text under the example's images with an edit each; empty if the example has no image."""
    if not example.images:
        return []
    images = tuple(replace(image, edit=edit) for image, edit in zip(example.images, edits, strict=True))
    return [Completion(example.chosen.text, origin="perturbed", kind=kind, made=made, images=images)]
