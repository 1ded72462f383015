"""The English of the shapes world: sentences, their text, and an exact parser.

    sentence := [opener] item {"and" item} "."
    item     := object [relation object]
    object   := "a" size colour shape [place]

Words are lower case and separated by single spaces.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cwdpo.worlds._scenes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, relation_holds

OPENERS = ("", "there is", "i see", "the picture shows")


@dataclass(frozen=True)
class StatedObject:
    """One object as a sentence states it; ``place`` is ``None`` if the sentence gives no place."""

    size: str
    colour: str
    shape: str
    place: str | None = None


@dataclass(frozen=True)
class Sentence:
    """A well-formed description.

    ``relations[i]`` is between objects ``i`` and ``i + 1``: a relation, or ``None`` for "and".
    """

    opener: str
    objects: tuple[StatedObject, ...]
    relations: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """The sentence in words, ending in " ."."""
        words = [self.opener] if self.opener else []
        for item, link in itertools.zip_longest(self.objects, self.relations):
            words.append(f"a {item.size} {item.colour} {item.shape}")
            if item.place is not None:
                words.append(item.place)
            words.append(link or "and")
        words[-1] = "."
        return " ".join(words)


def _match(words: Sequence[str], at: int, phrases: Sequence[str]) -> tuple[str | None, int]:
    """The phrase that starts at word ``at`` (or ``None``) and the position after it."""
    for phrase in phrases:
        parts = phrase.split()
        if list(words[at : at + len(parts)]) == parts:
            return phrase, at + len(parts)
    return None, at


def parse(text: str) -> Sentence | None:
    """The sentence of a text; ``None`` if the grammar does not produce the text.

    ``parse(s.text) == s`` for every sentence s, and ``parse(t).text == t`` for every text t that it accepts.
    """
    words = text.split(" ")
    opener, at = _match(words, 0, OPENERS[1:])
    objects: list[StatedObject] = []
    relations: list[str | None] = []
    while True:
        stated: list[str] = []
        for allowed in (("a",), SIZES, COLOURS, SHAPES):
            word, at = _match(words, at, allowed)
            if word is None:
                return None
            stated.append(word)
        place, at = _match(words, at, PLACES)
        _, size, colour, shape = stated
        objects.append(StatedObject(size, colour, shape, place))
        if list(words[at:]) == ["."]:
            return Sentence(opener or "", tuple(objects), tuple(relations))
        link, at = _match(words, at, ("and", *RELATIONS))
        # An item has at most one relation: the grammar does not produce "a left of b above c".
        if link is None or (link != "and" and relations and relations[-1] is not None):
            return None
        relations.append(None if link == "and" else link)


def caption(scene: Scene, rng: random.Random) -> str:
    """A true and complete description of the scene, chosen at random from all of them.

    With two or more objects it states a relation with probability 0.4; otherwise it states the place of each object.
    """
    order = rng.sample(scene.objects, len(scene.objects))
    opener = rng.choice(OPENERS)
    by_relation = len(order) > 1 and rng.random() < 0.4
    relation: str | None = None
    if by_relation:
        relation = rng.choice([r for r in RELATIONS if relation_holds(order[0].place, r, order[1].place)])
    objects = tuple(StatedObject(o.size, o.colour, o.shape, None if by_relation else o.place) for o in order)
    return Sentence(opener, objects, (relation, None)[: len(order) - 1]).text


def true_captions(scene: Scene) -> Iterator[str]:
    """Every description that :func:`caption` can return for the scene, each once."""
    for opener in OPENERS:
        for order in itertools.permutations(scene.objects):
            links = (None,) * (len(order) - 1)
            placed = tuple(StatedObject(o.size, o.colour, o.shape, o.place) for o in order)
            yield Sentence(opener, placed, links).text
            bare = tuple(StatedObject(o.size, o.colour, o.shape) for o in order)
            for relation in RELATIONS if links else ():
                if relation_holds(order[0].place, relation, order[1].place):
                    yield Sentence(opener, bare, (relation, *links[1:])).text


def paraphrases(text: str) -> list[str]:
    """All other sentences with the same facts: with another opener, or with the objects in another order.

    The order of the objects changes only if the sentence has no relation. Empty if the text is not a sentence.
    """
    said = parse(text)
    if said is None:
        return []
    free = not any(said.relations)
    orders = itertools.permutations(said.objects) if free else [said.objects]
    made = {Sentence(o, tuple(objects), said.relations).text for objects in orders for o in OPENERS}
    return sorted(made - {text})
