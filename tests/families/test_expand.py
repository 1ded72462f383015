"""Prompts from image sizes alone are those that the processor makes, for every family and for new sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conftest import picture
from cwdpo.data.encode.expand import CHECKED

BY_SIZE = {"smolvlm2", "idefics3", "pixtral", "mistral3", "mllama", "lfm2_vl"}
"""Families whose texts are not a repeated token: one blank image of each size is processed."""


def test_prompts_from_sizes_are_the_processors(family: Any) -> None:
    """After :data:`CHECKED` rows no image is decoded, and rows of new sizes have the processor's own tokens."""
    rows = [e for e in family.examples if e.images and not e.videos and e.id != "pictures"]
    sizes = [(40 + 24 * k, 200 - 16 * k) for k in range(CHECKED + 4)]
    rows = [replace(rows[k % len(rows)], images=(picture(*size, k),)) for k, size in enumerate(sizes)]
    several = [e for e in family.examples if e.id == "pictures"]
    ours, theirs = family.encoder, family.policy.encoder(from_sizes=False)
    for example in (*rows, *several, *several):
        ours_now, wanted = ours.prompt(example), theirs.prompt(example)
        assert ours_now.input_ids == wanted.input_ids, example.id
        assert ours_now.per_token == wanted.per_token, example.id
    kind = ours.prompt.expansions._kinds[1]
    assert kind.by_rule == (family.name not in BY_SIZE)
    decoded = set(ours.prompt._images)
    late = [e for e in rows[CHECKED:] if (e.images, e.prompt) not in decoded]
    assert len(late) == len(rows) - CHECKED, "rows of further sizes are not decoded"
    for example in late:
        images, wanted = ours.prompt(example).images, theirs.prompt(example).images
        assert images.keys() == wanted.keys()
        assert all((images[name] == wanted[name]).all() for name in images)
