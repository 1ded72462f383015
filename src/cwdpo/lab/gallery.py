"""Test images with the captions of some variants, and, for the embedded world, what is wrong in them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cwdpo.lab.grid import CellResult
from cwdpo.lab.plan import BASE, Plan
from cwdpo.lab.spec import Study
from cwdpo.lab.warm import held_rows
from cwdpo.records import Example
from cwdpo.report.summary import Caption, Picture
from cwdpo.worlds.judged import all_judgeable, judge_captions, scene_of
from cwdpo.worlds.shapes import OPENERS, true_captions

IMAGES = 6
"""Number of test images whose captions are shown."""
VARIANTS = 5
"""Number of variants whose answers are shown, if the study names none, for data that is not from the world."""


@dataclass(frozen=True)
class Gallery:
    """The images, and how they and their captions were chosen."""

    pictures: tuple[Picture, ...] = ()
    note: str = ""


def gallery(out: Path, study: Study, planned: Plan, results: Mapping[str, CellResult], seed: int) -> Gallery:
    """The first test images whose captions the judge does not mark alike, with the captions at temperature 1.

    Before them the first image for which some captions are sentences of the world and others are not. Of other data,
    the first images to which not all variants give the same greedy answer, with these answers.

    Args:
        out: the study's folder.
        study: names the variants, after the starting model.
        planned: its cells.
        results: the finished ones; others have no captions.
        seed: whose captions.
    """
    first = next(iter([*planned.cells.values(), *planned.late.values()]), None)
    if first is None:
        return Gallery()
    test = held_rows(first.test, first.recipe)
    world = all_judgeable(test)
    names = study.pictured or study.shown or (() if world else tuple(study.variants)[:VARIANTS])
    keys = {name: f"{name}-seed{seed}" for name in names}
    labels = {name: study.label(name) for name in names}
    if BASE in results:
        keys, labels = {"": BASE, **keys}, {"": "before training", **labels}
    if not world:
        return _answers(out, test, keys, labels, results)
    written: list[list[Caption]] = [[] for _ in test]
    for name, key in keys.items():
        texts = results[key].figures.get("sampled", []) if key in results else []
        for captions, text, j in zip(written, texts, judge_captions(test[: len(texts)], texts), strict=False):
            marks = (j.all_correct, j.wrong, j.hallucinated, j.omitted, j.ill_formed)
            captions.append(Caption(labels[name], text, *marks, name=name))
    told = [i for i, captions in enumerate(written) if len({_kind(c) for c in captions if c.name}) > 1]
    broken = [i for i in told if len({c.ill_formed for c in written[i] if c.name}) > 1][:1]
    chosen = [*broken, *(i for i in told or range(len(test)) if i not in broken)][:IMAGES]
    note = (
        f"Captions sampled at temperature 1, seed {seed}: the first test image on which not all of these methods "
        "write a sentence, then the first on which they do not do equally well. Marked: what differs from the nearest "
        "true caption."
    )
    return Gallery(tuple(_picture(test[i], written[i], out) for i in chosen), note)


def _answers(
    out: Path,
    test: Sequence[Example],
    keys: Mapping[str, str],
    labels: Mapping[str, str],
    results: Mapping[str, CellResult],
) -> Gallery:
    """The greedy answers of the finished cells to the first prompts with an image file to which they differ."""
    said = {name: results[key].figures.get("greedy") for name, key in keys.items() if key in results}
    known = {name: texts for name, texts in said.items() if texts}
    differ = (i for i in range(len(test)) if len({texts[i] for texts in known.values()}) > 1)
    shown = [i for i in differ if test[i].images and test[i].images[0].path is not None][:IMAGES]
    pictures = tuple(
        Picture(
            os.path.relpath(str(test[i].images[0].path), out),
            (*test[i].references, test[i].chosen.text)[0],
            tuple(Caption(labels[name], texts[i], name=name) for name, texts in known.items()),
        )
        for i in shown
    )
    return Gallery(pictures, "Greedy answers to the first test prompts to which not all of these are equal.")


def _kind(caption: Caption) -> tuple[bool | None, bool]:
    return caption.all_correct, caption.ill_formed


def _picture(example: Example, captions: Sequence[Caption], out: Path) -> Picture:
    shown = tuple(
        Caption(**{**vars(c), "parts": () if c.all_correct else marked(c.text, example)}) for c in captions
    )
    return Picture(os.path.relpath(str(example.images[0].path), out), example.chosen.text, shown)


def marked(text: str, example: Example) -> tuple[tuple[str, bool], ...]:
    """The text in pieces; ``True``: not in the true caption of the image that is most like the text.

    Args:
        text: a caption, of any form.
        example: a row of the embedded world.
    """
    words = text.split()
    opener = next((o for o in sorted(OPENERS, key=len, reverse=True) if text.startswith(o)), "")
    scene = scene_of(example)
    every = [t.split() for t in true_captions(scene) if t.startswith(opener)]
    matches = (difflib.SequenceMatcher(None, words, true, autojunk=False) for true in every)
    best = max(matches, key=lambda match: match.ratio())
    pieces = []
    for tag, start, end, *_ in best.get_opcodes():
        if start < end:
            pieces.append((" ".join(words[start:end]), tag != "equal"))
    return tuple(pieces)
