"""Which images are shown with which captions, and what is marked in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo.data.read.reader import read_examples
from cwdpo.lab.gallery import gallery, marked
from cwdpo.lab.grid import CellResult
from cwdpo.lab.plan import BASE, asked, checked_tree, plan
from cwdpo.lab.spec import RECIPE
from cwdpo.worlds.judged import scene_of
from cwdpo.worlds.shapes import true_captions
from small_study import study


def test_images_are_the_first_on_which_the_methods_do_not_do_equally_well(tmp_path: Path) -> None:
    spec = study(base=True, shown=("cw_dpo",), pictured=("dpo", "cw_dpo"))
    planned = plan(tmp_path, checked_tree(RECIPE), spec, asked(spec, [0], {}), split="test", test=None)
    test = read_examples(planned.job("dpo-seed0").test).examples
    right = [e.chosen.text for e in test]
    # The first is a sentence, of another image; the second and the fourth are not sentences.
    broken = [right[2], "a a red", right[2], f"{right[3]} ."]
    results = {
        key: CellResult(key, "done", {"sampled": texts}, None, 1.0)
        for key, texts in ((BASE, ["a ."] * 4), ("cw_dpo-seed0", right), ("dpo-seed0", broken))
    }
    found = gallery(tmp_path, spec, planned, results, 0)
    assert "seed 0" in found.note
    assert [p.truth for p in found.pictures] == [right[1], right[0], right[3]]
    shown = [tmp_path / p.image for p in found.pictures]
    assert shown == [test[i].images[0].path for i in (1, 0, 3)]
    labels = [(c.label, c.name, c.ill_formed) for c in found.pictures[0].captions]
    assert labels == [("before training", "", True), ("DPO", "dpo", True), ("CW-DPO", "cw_dpo", False)]
    assert found.pictures[0].captions[2].parts == (), "nothing is wrong in it"
    assert found.pictures[2].captions[1].parts == ((right[3], False), (".", True))
    del results["dpo-seed0"]
    alone = gallery(tmp_path, spec, planned, results, 0)
    assert [c.name for c in alone.pictures[0].captions] == ["", "cw_dpo"], "a study that runs"


@pytest.mark.parametrize("number", range(4))
def test_a_wrong_word_is_marked(number: int, world_folder: Path) -> None:
    example = read_examples(world_folder / "train.jsonl").examples[number]
    text = next(iter(true_captions(scene_of(example))))
    words = text.split()
    assert marked(text, example) == ((text, False),)
    wrong = [*words[:1], "purple-ish", *words[2:]]
    assert marked(" ".join(wrong), example) == (
        (words[0], False), ("purple-ish", True), (" ".join(words[2:]), False),
    )  # fmt: skip
    assert marked("", example) == ()
