"""Rows of the embedded world whose rejected side is another picture."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from cwdpo.data.read.reader import read_examples
from cwdpo.worlds._negatives import hard_scene
from cwdpo.worlds._scenes import HELD_OUT
from cwdpo.worlds.shapes import ShapesSettings, caption, judge, make_scene, materialise, render


def test_one_object_is_changed_so_that_the_caption_is_wrong() -> None:
    for index in range(200):
        scene, rng = make_scene(3, "train", index), random.Random(index)
        text = caption(scene, rng)
        changed = hard_scene(scene, text, rng)
        assert judge(text, scene).all_correct
        assert not judge(text, changed).all_correct
        pairs = list(zip(scene.objects, changed.objects, strict=True))
        ((old, new),) = [(a, b) for a, b in pairs if a != b]
        differ = {k for k, v in vars(old).items() if v != getattr(new, k)}
        assert differ in ({"colour"}, {"shape"}, {"size", "radius"})
        assert replace(changed, objects=scene.objects) == scene
        assert len({o.shape for o in changed.objects}) == len(changed.objects)
        assert not {(o.colour, o.shape) for o in changed.objects} & HELD_OUT
        assert not np.array_equal(render(scene), render(changed))


def test_rows_gain_the_picture_and_are_else_the_same(tmp_path: Path) -> None:
    plain = ShapesSettings(seed=3, train=40, validation=4, test=0)
    materialise(plain, tmp_path / "plain")
    materialise(plain.model_copy(update={"image_negatives": True}), tmp_path / "with")
    rows = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("plain", "with")
    ]
    for old, new in zip(*rows, strict=True):
        assert new["negatives"][: len(old["negatives"])] == old["negatives"]
        assert {**new, "negatives": old["negatives"]} == old
    captions = [
        e for e in read_examples(tmp_path / "with" / "train.jsonl").examples if "describe" in e.prompt_text
    ]
    assert len(captions) > 20
    for example in captions:
        (negative,) = [c for c in example.rejected if c.images is not None]
        assert (negative.text, negative.kind) == (example.chosen.text, "image_hard")
