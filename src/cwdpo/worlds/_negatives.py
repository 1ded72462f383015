"""Negatives of the shapes world, by kind, and the noisy captions that a base model is pretrained on.

A negative states a held-out combination only if the scene has one. Otherwise training texts would contain these
combinations in negatives only, and a policy could reject them without looking at the image.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from cwdpo.errors import DataError
from cwdpo.records import Completion
from cwdpo.worlds._grammar import Sentence, StatedObject, caption, parse
from cwdpo.worlds._judge import judge
from cwdpo.worlds._scenes import COLOURS, HELD_OUT, PLACES, RADIUS, RELATIONS, SHAPES, SIZES, Scene

_SIMILAR = {
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange", "green"),
    "green": ("cyan", "yellow"),
    "cyan": ("green", "blue"),
    "blue": ("cyan", "purple"),
    "purple": ("blue", "pink"),
    "pink": ("purple", "red"),
    "circle": ("ring",),
    "ring": ("circle",),
    "square": ("diamond",),
    "diamond": ("square", "triangle"),
    "triangle": ("diamond",),
    "cross": ("diamond", "square"),
}
_SIMILAR_SHARE = 0.6
_WORDS = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}

Slot = tuple[str, int]
"""What can be changed in a sentence: (size | colour | shape | place | relation, index)."""


def _slots(sentence: Sentence, rng: random.Random) -> list[Slot]:
    """Every slot once, in random order; each sort of slot has the same chance to be first."""
    by_sort: dict[str, list[Slot]] = {key: [] for key in (*_WORDS, "place", "relation")}
    for i, item in enumerate(sentence.objects):
        for key in (*_WORDS, *(("place",) if item.place is not None else ())):
            by_sort[key].append((key, i))
    by_sort["relation"] = [("relation", i) for i, r in enumerate(sentence.relations) if r is not None]
    columns = [rng.sample(slots, len(slots)) for slots in by_sort.values() if slots]
    rng.shuffle(columns)
    return [slot for row in itertools.zip_longest(*columns) for slot in row if slot is not None]


def _other_words(word: str, words: Sequence[str], rng: random.Random) -> list[str]:
    """The other words of a family in random order; with probability 0.6 the similar ones are first."""
    others = rng.sample([w for w in words if w != word], len(words) - 1)
    similar = _SIMILAR.get(word, ())
    near_first = rng.random() < _SIMILAR_SHARE
    return sorted(others, key=lambda w: (w in similar) != near_first) if similar else others


def _changes(sentence: Sentence, slot: Slot, rng: random.Random) -> Iterator[Sentence]:
    """The sentence with one word of the slot changed, in random order of the new words."""
    key, i = slot
    if key == "relation":
        old = sentence.relations[i]
        for word in _other_words(old or "", RELATIONS, rng) if old else ():
            yield replace(sentence, relations=(*sentence.relations[:i], word, *sentence.relations[i + 1 :]))
        return
    old = getattr(sentence.objects[i], key)
    if key == "place":
        near = [p for p in PLACES if sum(a != b for a, b in zip(p.split(), old.split(), strict=True)) == 1]
        words = rng.sample(near, len(near))
    else:
        words = _other_words(old, _WORDS[key], rng)
    for word in words:
        changed = replace(sentence.objects[i], **{key: word})
        yield replace(sentence, objects=(*sentence.objects[:i], changed, *sentence.objects[i + 1 :]))


def _novel(sentence: Sentence) -> set[tuple[str, str]]:
    return {(o.colour, o.shape) for o in sentence.objects} & HELD_OUT


def _edited(sentence: Sentence, slot: Slot, scene: Scene, rng: random.Random) -> Sentence | None:
    """The first change of the slot that is allowed and makes the sentence wrong."""
    for changed in _changes(sentence, slot, rng):
        allowed = scene.held_out or _novel(changed) <= _novel(sentence)
        if allowed and not judge(changed.text, scene).all_correct:
            return changed
    return None


def _added(sentence: Sentence, scene: Scene, rng: random.Random, favourite: float = 0.0) -> Sentence | None:
    """The sentence with one more object that is not in the scene; a blue circle with probability ``favourite``."""
    present = {(o.colour, o.shape) for o in scene.objects}
    stated = {(o.colour, o.shape) for o in sentence.objects}
    looks = [
        look
        for look in itertools.product(COLOURS, SHAPES)
        if look not in present | stated and (scene.held_out or look not in HELD_OUT)
    ]
    look = rng.choice(looks)
    if rng.random() < favourite:
        look = ("blue", "circle")
        if look in present | stated:
            return None
    place = None
    if sentence.objects[0].place is not None:
        free = [p for p in PLACES if p not in {o.place for o in sentence.objects}]
        place = rng.choice(free or PLACES)
    item = StatedObject(rng.choice(SIZES), *look, place)
    return replace(sentence, objects=(*sentence.objects, item), relations=(*sentence.relations, None))


def _dropped(sentence: Sentence, rng: random.Random) -> Sentence:
    """The sentence without one of its objects, and without the relations of that object."""
    i = rng.randrange(len(sentence.objects))
    links = list(sentence.relations)
    if i == 0:
        links = links[1:]
    elif i == len(sentence.objects) - 1:
        links = links[:-1]
    else:
        links[i - 1 : i + 1] = [None]
    return replace(sentence, objects=sentence.objects[:i] + sentence.objects[i + 1 :], relations=tuple(links))


def _sentence(chosen: str) -> Sentence:
    sentence = parse(chosen)
    if sentence is None:
        raise DataError(
            f"shapes world: {chosen!r} is not a sentence of its grammar, so no negative can be made from it"
        )
    return sentence


def edit(chosen: str, changed: str) -> dict[str, Any]:
    """The differing words: ``from``, ``to`` and ``position`` (index of the first differing word)."""
    old, new = chosen.split(" "), changed.split(" ")
    start = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    return {
        "from": " ".join(old[start : len(old) - end]),
        "to": " ".join(new[start : len(new) - end]),
        "position": start,
    }


def hard(
    scene: Scene,
    chosen: str,
    rng: random.Random,
    others: Sequence[Scene] = (),
) -> Completion:
    """``chosen`` with one wrong word: a size, colour, shape, place or relation ("left of" counts as one word).

    Colours and shapes change to a similar one with probability 0.6. ``made`` contains the edit.

    Raises:
        DataError: ``chosen`` is not a sentence of the grammar.
    """
    sentence = _sentence(chosen)
    for slot in _slots(sentence, rng):
        changed = _edited(sentence, slot, scene, rng)
        if changed is not None:
            return Completion(changed.text, "dataset", "hard", edit(chosen, changed.text))
    raise AssertionError("a sentence always has a wrong neighbour")


def medium(
    scene: Scene,
    chosen: str,
    rng: random.Random,
    others: Sequence[Scene] = (),
) -> Completion:
    """``chosen`` with about three errors; one of them is often an added or omitted object.

    ``made`` contains the judge's counts: ``wrong``, ``hallucinated``, ``omitted``.

    Raises:
        DataError: ``chosen`` is not a sentence of the grammar.
    """
    start = _sentence(chosen)
    while True:
        sentence, steps = start, 3
        if rng.random() < 0.6:
            few = len(sentence.objects) < 3
            drop = len(sentence.objects) > 1 and (not few or rng.random() < 0.5)
            structural = _dropped(sentence, rng) if drop else _added(sentence, scene, rng)
            assert structural is not None
            sentence, steps = structural, 2
        for slot in _slots(sentence, rng)[:steps]:
            sentence = _edited(sentence, slot, scene, rng) or sentence
        verdict = judge(sentence.text, scene)
        if verdict.errors >= 2 and sentence != start:
            made = {k: getattr(verdict, k) for k in ("wrong", "hallucinated", "omitted")}
            return Completion(sentence.text, "dataset", "medium", made)


def easy(scene: Scene, chosen: str, rng: random.Random, others: Sequence[Scene] = ()) -> Completion:
    """A true caption of another image that is false for this one.

    Raises:
        DataError: no scene of ``others`` has a caption that is false here.
    """
    for other in rng.sample(others, len(others)):
        text = caption(other, rng)
        if text != chosen and not judge(text, scene).all_correct:
            return Completion(text, "dataset", "easy")
    raise DataError(
        f"shapes world: none of {len(others)} other scenes differs from this one; pass more scenes"
    )


def shuffled(
    scene: Scene,
    chosen: str,
    rng: random.Random,
    others: Sequence[Scene] = (),
) -> Completion:
    """The words of ``chosen`` in random order (the full stop stays last); ill-formed.

    Raises:
        DataError: ``chosen`` is not a sentence of the grammar.
    """
    _sentence(chosen)
    words = chosen.split(" ")[:-1]
    while True:
        text = " ".join([*rng.sample(words, len(words)), "."])
        if parse(text) is None:
            return Completion(text, "dataset", "shuffled")


NegativeMaker = Callable[[Scene, str, random.Random, Sequence[Scene]], Completion]
NEGATIVES: dict[str, NegativeMaker] = {"hard": hard, "medium": medium, "easy": easy, "shuffled": shuffled}
"""The kinds of negatives by name; each maker takes (scene, chosen, rng, other scenes)."""


def hard_scene(scene: Scene, chosen: str, rng: random.Random) -> Scene:
    """The scene with the size, colour or shape of one object changed, so that ``chosen`` is not all correct.

    No combination is new to the training scenes, and the shapes stay different.
    """
    changes = [
        (i, key, word)
        for i, item in enumerate(scene.objects)
        for key, words in _WORDS.items()
        for word in words
        if word != getattr(item, key)
    ]
    for i, key, word in rng.sample(changes, len(changes)):
        others = [item.shape for item in scene.objects[:i] + scene.objects[i + 1 :]]
        new: dict[str, Any] = {key: word}
        if key == "size":
            new["radius"] = round(rng.uniform(*RADIUS[word]), 2)
        changed = replace(scene.objects[i], **new)
        if changed.shape in others or (changed.colour, changed.shape) in HELD_OUT:
            continue
        made = replace(scene, objects=(*scene.objects[:i], changed, *scene.objects[i + 1 :]))
        if not judge(chosen, made).all_correct:
            return made
    raise DataError(f"no change of the scene makes this caption wrong: {chosen!r}")


def noisy_caption(scene: Scene, rng: random.Random, error_rate: float = 0.35) -> str:
    """A caption that has one or two errors with probability ``error_rate``.

    An error changes a word (55%), adds an object (30%; mostly a blue circle, so that a base model learns one typical
    hallucination) or omits one (15%).
    """
    sentence = _sentence(caption(scene, rng))
    if rng.random() >= error_rate:
        return sentence.text
    for _ in range(rng.choice((1, 2))):
        sort = rng.random()
        changed: Sentence | None = None
        if sort < 0.3:
            changed = _added(sentence, scene, rng, favourite=0.7)
        elif sort < 0.45 and len(sentence.objects) > 1:
            changed = _dropped(sentence, rng)
        if changed is None or judge(changed.text, scene).all_correct:
            changed = _edited(sentence, _slots(sentence, rng)[0], scene, rng)
        sentence = changed or sentence
    if judge(sentence.text, scene).all_correct:
        return hard(scene, sentence.text, rng).text
    return sentence.text
