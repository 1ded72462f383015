"""The judge of the shapes world: counts what a description states rightly, states wrongly, adds and omits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cwdpo.worlds._grammar import Sentence, StatedObject, parse
from cwdpo.worlds._scenes import Scene, SceneObject, relation_holds


@dataclass(frozen=True)
class Judgement:
    """The judgement of a description of a scene.

    ``score`` is the F1 of the stated facts (size, colour, shape and, if stated, place of each object, and each stated
    relation), in [0, 1]; it is 1 exactly when ``all_correct``. ``wrong`` counts wrong attributes, places and relations
    of objects in the scene; ``hallucinated`` and ``omitted`` count objects. An ill-formed text has score 0 and omits
    every object.
    """

    all_correct: bool
    score: float
    wrong: int
    hallucinated: int
    omitted: int
    ill_formed: bool

    @property
    def errors(self) -> int:
        """All errors together: wrong + hallucinated + omitted."""
        return self.wrong + self.hallucinated + self.omitted


def judge(caption: str, scene: Scene) -> Judgement:
    """Judge a description of a scene, with the best assignment of stated objects to true objects.

    A stated object can be assigned to a true one if they have the same colour, shape or place; an object that is not
    assigned is hallucinated. Places and relations are not required, but are counted if stated.
    """
    sentence = parse(caption)
    if sentence is None:
        return Judgement(False, 0.0, 0, 0, len(scene.objects), True)
    best = max(
        (_grade(sentence, scene, choice) for choice in _assignments(sentence, scene)),
        key=lambda graded: (graded[0], -graded[1].errors),
    )
    return best[1]


def _assignments(sentence: Sentence, scene: Scene) -> list[tuple[int | None, ...]]:
    """All assignments: for each true object, the index of its stated object, or ``None``."""
    options = [
        [None, *(i for i, stated in enumerate(sentence.objects) if _may_be(stated, true))]
        for true in scene.objects
    ]
    ways = itertools.product(*options)
    return [w for w in ways if len(used := [i for i in w if i is not None]) == len(set(used))]


def _may_be(stated: StatedObject, true: SceneObject) -> bool:
    return stated.colour == true.colour or stated.shape == true.shape or stated.place == true.place


def _grade(sentence: Sentence, scene: Scene, choice: Sequence[int | None]) -> tuple[int, Judgement]:
    """The number of right facts and the judgement under one assignment."""
    place_of: dict[int, str] = {}
    right = required = wrong = 0
    for i, true in zip(choice, scene.objects, strict=True):
        required += 3
        if i is None:
            continue
        stated = sentence.objects[i]
        place_of[i] = true.place
        same = [stated.size == true.size, stated.colour == true.colour, stated.shape == true.shape]
        if stated.place is not None:
            same.append(stated.place == true.place)
            required += 1
        right += sum(same)
        wrong += len(same) - sum(same)
    stated_facts = sum(3 + (stated.place is not None) for stated in sentence.objects)
    for i, relation in enumerate(sentence.relations):
        if relation is None:
            continue
        stated_facts += 1
        if i in place_of and i + 1 in place_of:
            holds = relation_holds(place_of[i], relation, place_of[i + 1])
            required += 1
            right += holds
            wrong += not holds
    hallucinated = len(sentence.objects) - len(place_of)
    omitted = len(scene.objects) - len(place_of)
    score = 2 * right / (stated_facts + required)
    return right, Judgement(
        wrong + hallucinated + omitted == 0, score, wrong, hallucinated, omitted, ill_formed=False
    )
